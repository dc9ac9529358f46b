#!/usr/bin/env python3
"""The demo: one batch, cold, then warm in a new process, then without any cache; a table that sets them side by side.

make demo          # or: python examples/demo.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

TOP = Path(__file__).parent.parent
RUNS = TOP / "runs"
MODEL, BATCH = "examples/recall-1m", TOP / "examples" / "catalogue.jsonl"
EVERY = 6
"""Without cache every prompt costs its whole length, so that run answers one question in six."""


def run(name: str, *changes: str) -> dict[str, object]:
    """One `hpckv run` in a process of its own; what it counted, its texts among it."""
    settings = [part for change in changes for part in ("--set", change)]
    command = [
        sys.executable,
        "-m",
        "hpckv.cli.main",
        "run",
        "examples/demo.yaml",
        "--output",
        f"runs/{name}",
        *settings,
    ]
    subprocess.run(command, cwd=TOP, check=True)
    lines = read_lines(RUNS / name / "output.jsonl")
    texts = {n["custom_id"]: n["response"]["body"]["choices"][0]["message"]["content"].strip() for n in lines}
    summary = json.loads((RUNS / name / "summary.json").read_text(encoding="utf-8"))
    return {**summary, "texts": texts}


def read_lines(path: Path) -> list[dict]:
    """A JSON lines file."""
    return [json.loads(raw) for raw in path.read_text(encoding="utf-8").splitlines()]


def main() -> int:
    """Run, print, and say whether what the README promises holds."""
    console = Console(highlight=False)
    for name in ("demo-store", "demo-cold", "demo-warm", "demo-plain"):
        shutil.rmtree(RUNS / name, ignore_errors=True)
    RUNS.mkdir(exist_ok=True)
    console.print("[bold]1. cold[/]: an empty store")
    cold = run("demo-cold")
    console.print("[bold]2. warm[/]: a new process, the store of the first")
    warm = run("demo-warm")
    console.print("[bold]3. plain[/]: no store, and every prompt by itself")
    some = RUNS / "demo-plain.jsonl"
    some.write_text("".join(BATCH.read_text(encoding="utf-8").splitlines(keepends=True)[::EVERY]), encoding="utf-8")
    plain = run("demo-plain", "store=null", "cache.reuse=false", f"input={some}")

    answers = read_lines(BATCH.with_name(f"{BATCH.stem}_answers.jsonl"))
    table = Table(title=f"{MODEL}: questions about shared catalogues", title_justify="left", min_width=60)
    table.add_column("")
    columns = {"cold": cold, "warm": warm, f"no cache, 1 in {EVERY}": plain}
    for name in columns:
        table.add_column(name, justify="right")

    def row(label: str, value) -> None:  # noqa: ANN001
        table.add_row(label, *(value(result) for result in columns.values()))

    row("requests", lambda r: f"{r['requests']:,}")
    row("right answers", lambda r: f"{sum(r['texts'].get(a['custom_id']) == a['answer'] for a in answers):,}")
    row("prompt tokens", lambda r: f"{r['prompt_tokens']:,}")
    row("tokens computed", lambda r: f"{r['computed_tokens']:,}")
    row("read on the device", lambda r: f"{r['cached']['device']:,}")
    row("read from the store", lambda r: f"{r['cached']['host'] + r['cached']['shared']:,}")
    row("hit %", lambda r: f"{r['hit_percent']:.1f}")
    row("seconds, start to end", lambda r: f"{r['seconds']:.1f}")
    row("seconds answering", lambda r: f"{r['answering_seconds']:.1f}")
    console.print(table)

    checks = {
        "the warm run gives the answers of the cold one": warm["texts"] == cold["texts"],
        "both give those of a run without cache": plain["texts"].items() <= cold["texts"].items(),
        "at least 95 % of the warm run's prompt tokens come from the cache": warm["hit_percent"] >= 95,
        "the cold run computes no prefix twice": cold["scheduler"]["prefill_tokens"] == cold["least_prefill_tokens"],
    }
    for promise, holds in checks.items():
        console.print(f"{'[green]yes[/]' if holds else '[red]NO [/]'}  {promise}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
