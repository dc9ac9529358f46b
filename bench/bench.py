#!/usr/bin/env python3
"""hpckv beside its peers on this machine: every engine in a fresh process, engines alternating, several rounds, medians.

    make bench                                  # hpckv and transformers
    VLLM_PYTHON=/path/to/venv/bin/python make bench      # and vLLM's CPU build from that environment

The rule, fixed before any run: a pass during which more than STEAL_LIMIT percent of the machine's time was stolen is
rejected, for every engine alike, and counted. What is printed are medians of the passes that are left.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
TOP = HERE.parent
STEAL_LIMIT = 5.0
PASS_LIMIT_S = 600


def run_engine(name: str, python: str, model: Path, names: str) -> list[dict]:
    """One process of one engine; its passes, or none if it failed (said)."""
    environ = {
        **os.environ, "BENCH_STARTED": str(time.time()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
    }  # fmt: skip
    command = [python, str(HERE / "driver.py"), name, "--model", str(model), "--workloads", names]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=PASS_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        print(f"{name}: no end within {PASS_LIMIT_S} s", file=sys.stderr)
        return []
    rows = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not rows:
        print(f"{name}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
    return rows


def report(rows: list[dict], console: Console) -> None:
    """Medians by workload, cache and engine."""
    kept = [r for r in rows if r["steal_percent"] <= STEAL_LIMIT]
    console.print(f"{len(rows)} passes, {len(rows) - len(kept)} rejected for steal above {STEAL_LIMIT:.0f} %")
    columns = "workload cache engine passes wall_s CPU_s in_tokens/s out_tokens/s cached start_s of_hpckv's_speed"
    table = Table(*(column.replace("_", " ") for column in columns.split()))
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in kept:
        groups.setdefault((row["workload"], row["cache"], row["engine"]), []).append(row)
    for (workload, cache, engine), group in sorted(groups.items()):
        median = {
            key: statistics.median(r[key] for r in group) for key in ("wall_s", "cpu_s", "cached_tokens", "start_s")
        }
        wall = median["wall_s"]
        ours = groups.get((workload, cache, "hpckv"))
        share = statistics.median(r["wall_s"] for r in ours) / wall if ours else float("nan")
        rates = [f"{group[0][key] / wall:,.0f}" for key in ("prompt_tokens", "output_tokens")]
        cells = [
            f"{wall:.2f}",
            f"{median['cpu_s']:.1f}",
            *rates,
            f"{median['cached_tokens']:,.0f}",
            f"{median['start_s']:.1f}",
        ]
        table.add_row(workload, cache, engine, str(len(group)), *cells, f"{share:.2f}")
    console.print(table)
    ours = [r for r in kept if r["engine"] == "hpckv" and r["cache"] == "cold"]
    if ours:
        coordination = [r["parts"]["schedule_s"] / r["wall_s"] for r in ours]
        console.print(
            f"scheduling: {100 * statistics.median(coordination):.2f} % of hpckv's wall time (median of cold passes)"
        )


def main() -> None:
    """Run the rounds."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--workloads", default="W1:half,W3:half")
    ap.add_argument("--model", type=Path, default=TOP / "runs" / "bench" / "mid-bf16")
    ap.add_argument("--engines", default="")
    ap.add_argument("--out", type=Path, default=TOP / "runs" / "bench" / "passes.jsonl")
    args = ap.parse_args()

    subprocess.run([sys.executable, str(HERE / "make_model.py"), str(args.model)], check=True)
    pythons = {"hpckv": sys.executable, "transformers": sys.executable, "transformers-prefix": sys.executable}
    vllm = os.environ.get("VLLM_PYTHON")
    if vllm:
        pythons |= {"vllm": vllm, "vllm-plain": vllm}
    else:
        print("vLLM: not measured, VLLM_PYTHON names no environment that has it", file=sys.stderr)
    engines = args.engines.split(",") if args.engines else list(pythons)
    rows: list[dict] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for number in range(args.rounds):
        for name in engines:
            found = run_engine(name, pythons[name], args.model, args.workloads)
            rows += found
            with args.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"round": number, **row}) + "\n" for row in found)
            print(
                f"round {number + 1}/{args.rounds} {name}: "
                + ", ".join(f"{r['workload']} {r['cache']} {r['wall_s']:.2f} s" for r in found),
                file=sys.stderr,
            )
    report(rows, Console(width=150, highlight=False))


if __name__ == "__main__":
    main()
