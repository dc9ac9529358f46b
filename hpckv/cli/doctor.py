"""`hpckv doctor`: what of this machine a run needs and has. No torch in this process."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from hpckv.errors import CapabilityError
from hpckv.launch.doctor import examine
from hpckv.launch.finding import Finding, Verdict

_COLORS = {Verdict.PASS: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}


def doctor(
    directory: Annotated[
        Path, typer.Argument(parser=Path, metavar="[DIR]", help="Where the store or the run will be.")
    ] = Path(),
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Look at GPU, MPI, Slurm, container runtime and filesystem, and say what to do where something is amiss.

    It takes less than a minute, whatever hangs. Of several nodes: srun -N 4 hpckv doctor DIR

    Example: hpckv doctor /lustre/proj/kv

    Exit codes: 0 nothing FAILs; 78 something does.
    """
    findings = []
    host = socket.gethostname().partition(".")[0]
    console = Console(highlight=False)
    for finding in examine(directory):
        findings.append(finding)
        if not as_json:
            _print(console, host, finding)
    if as_json:
        rows = [{"host": host, **vars(finding), "verdict": finding.verdict.value} for finding in findings]
        typer.echo(json.dumps(rows))  # one line, which another node's is never mixed with
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        raise typer.Exit(CapabilityError.exit_code)


def _print(console: Console, host: str, finding: Finding) -> None:
    color = _COLORS[finding.verdict]
    lines = [f"{escape(host)}  [{color}]{finding.verdict.value}[/]  {finding.matter:<11} {escape(finding.found)}"]
    if finding.remedy:
        lines.append(f"{escape(host)}        {'':<11} {escape(finding.remedy)}")
    console.print("\n".join(lines), soft_wrap=True)
