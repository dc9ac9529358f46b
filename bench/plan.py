#!/usr/bin/env python3
"""What `hpckv plan` says beside what a run then takes: five batches, cold and warm, on the machine whose rates it was given.

    .venv/bin/python bench/plan.py

`hpckv bench load` measures the rates first; every batch is planned and run with a store, and once more in a new process.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
TOP = HERE.parent
HPCKV = [sys.executable, "-m", "hpckv.cli.main"]
# name: requests, tokens that all share, own tokens of a prompt, tokens of an answer
BATCHES = {
    "one document": (48, 1024, 64, 16),
    "nothing shared": (16, 0, 512, 32),
    "long answers": (16, 128, 64, 192),
    "long prompts": (8, 0, 1600, 4),
    "many short ones": (256, 256, 24, 6),
}


def write_batch(folder: Path, name: str) -> None:
    """The batch's input and run file."""
    count, shared, own, output = BATCHES[name]
    rng = random.Random(name)
    head = [rng.randrange(300, 31900) for _ in range(shared)]
    rows = []
    for number in range(count):
        prompt = head + [rng.randrange(300, 31900) for _ in range(own)]
        body = {"prompt": prompt, "max_tokens": output}
        rows.append({"custom_id": f"q{number}", "method": "POST", "url": "/v1/completions", "body": body})
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*arguments: object) -> str:
    """Its standard output."""
    done = subprocess.run([*HPCKV, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def main() -> None:
    """Measure, plan, run, compare."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, default=TOP / "runs" / "bench" / "mid-bf16")
    ap.add_argument("--rounds", type=int, default=1)
    given = ap.parse_args()
    subprocess.run([sys.executable, str(HERE / "make_model.py"), str(given.model)], check=True)
    table = Table(
        "batch", "", "tokens computed", "as planned", "hits", "as planned", "s", "planned", "off by", box=None
    )
    off = []
    with tempfile.TemporaryDirectory(prefix="hpckv-bench-", dir=TOP / "runs") as name:
        folder = Path(name)
        config = {
            "model": {"path": str(given.model)},
            "input": str(folder / "in.jsonl"),
            "output": str(folder / "out"),
            "site": str(folder / "site.yaml"),
            "sampling": {"ignore_eos": True},
            "engine": {"max_batch_tokens": 2048, "max_requests": 64},
            "store": {"shared": str(folder / "kv"), "write": "all", "local": "none"},
        }
        run_file = folder / "run.yaml"
        run_file.write_text(json.dumps(config))
        (folder / "in.jsonl").write_text("")
        (folder / "site.yaml").write_text("{}")
        rates = run("bench", "load", run_file, "--lengths", "256,512,1024,2048", "--site-fragment")
        (folder / "site.yaml").write_text(rates)
        print(rates, file=sys.stderr)
        for number in range(given.rounds):
            for batch in BATCHES:
                write_batch(folder, batch)
                for temperature in ("cold", "warm"):
                    own = [
                        "--output",
                        folder / f"{number} {batch} {temperature}",
                        "--set",
                        f"store.shared={folder / f'kv{number}'}",
                    ]
                    planned = json.loads(run("plan", run_file, *own, "--gpu", "cpu", "--json"))["gpus"][0]
                    run("-q", "run", run_file, *own)
                    found = json.loads((own[1] / "summary.json").read_text())
                    ratio = planned["seconds"] / found["process_seconds"]
                    off.append(ratio)
                    hits = [sum(row["cached"].values()) for row in (found, planned)]
                    cells = [found["computed_tokens"], planned["computed_tokens"], *hits]
                    seconds = [f"{found['process_seconds']:.1f}", f"{planned['seconds']:.1f}"]
                    table.add_row(
                        batch, temperature, *(f"{n:,}" for n in cells), *seconds, f"{100 * (ratio - 1):+.0f} %"
                    )
    Console(width=120, highlight=False).print(table)
    within = sum(abs(ratio - 1) <= 0.25 for ratio in off)
    print(f"{within} of {len(off)} within 25 %")


if __name__ == "__main__":
    main()
