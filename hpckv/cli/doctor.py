"""`hpckv doctor`: what of this machine a run needs and has. No torch in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from hpckv.errors import CapabilityError
from hpckv.launch.doctor import Finding, Verdict, examine

_COLORS = {Verdict.PASS: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}


def doctor(
    directory: Annotated[
        Path, typer.Argument(readable=False, metavar="[DIR]", help="Where the store or the run will be.")
    ] = Path(),
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Look at GPU, MPI, Slurm, container runtime and filesystem, and say what to do where something is amiss.

    Example: hpckv doctor /lustre/proj/kv

    Exit codes: 0 nothing FAILs; 78 something does.
    """
    findings = []
    console = Console(highlight=False)
    for finding in examine(directory):
        findings.append(finding)
        if not as_json:
            _print(console, finding)
    if as_json:
        rows = [{**vars(finding), "verdict": finding.verdict.value} for finding in findings]
        typer.echo(json.dumps(rows, indent=2))
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        raise typer.Exit(CapabilityError.exit_code)


def _print(console: Console, finding: Finding) -> None:
    color = _COLORS[finding.verdict]
    console.print(f"[{color}]{finding.verdict.value}[/]  {finding.matter:<11} {escape(finding.found)}", soft_wrap=True)
    if finding.remedy:
        console.print(f"                  {escape(finding.remedy)}", soft_wrap=True)
