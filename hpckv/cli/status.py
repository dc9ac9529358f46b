"""`hpckv status` and `hpckv cancel`: where a run stands, and to end its jobs. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hpckv.cli.show import print_facts
from hpckv.errors import SlurmError
from hpckv.launch.local_jobs import local_jobs
from hpckv.launch.slurm_jobs import cancel as cancel_job
from hpckv.launch.status import RunStatus, read_status
from hpckv.quantity import format_count, format_duration

Directory = Annotated[Path, typer.Argument(readable=False, metavar="DIR", help="The run directory.")]


def status(
    directory: Directory, *, as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False
) -> None:
    """Where a run stands: done, left, failed, tokens a second, time left, its jobs.

    Example: hpckv status runs/eval-1
    """
    found = read_status(directory)
    if as_json:
        record = {**asdict(found), "left": found.left, "hit_percent": round(found.hit_percent, 2)}
        typer.echo(json.dumps(record, indent=2))
        return
    print_facts(_facts(found))
    if found.jobs:
        table = Table("job", "state", "elapsed", "exit code", "where or why", box=None)
        for job in found.jobs:
            table.add_row(job.job, job.state, job.elapsed, job.exit_code, job.reason)
        Console(highlight=False).print(table)
    if found.state == "stopped":
        typer.echo("stopped with requests left: the same command goes on from there")


def cancel(directory: Directory) -> None:
    """End the jobs of a run. All answers so far stay, and the same command goes on from there.

    Example: hpckv cancel runs/eval-1
    """
    found = read_status(directory)
    jobs = [job.job for job in found.jobs if job.is_open]
    if not jobs:
        by_hand = "; it was started by hand, so end it there" if found.state == "running" else ""
        typer.echo(f"{directory}: no job of this run is running or waiting{by_hand}")
    here = {job.name: job for job in local_jobs(directory)}
    troubles = {job: here[job].cancel() if job in here else cancel_job(job) for job in jobs}
    for job, trouble in troubles.items():
        typer.echo(f"{job}: {trouble or 'cancelled'}")
    if any(troubles.values()):
        raise typer.Exit(SlurmError.exit_code)


def _facts(found: RunStatus) -> dict[str, object]:
    facts: dict[str, object] = {
        "state": found.state,
        "requests": found.requests,
        "answered": found.answered,
        "failed": found.failed,
        "left": found.left,
        "prompt tokens": f"{format_count(found.prompt_tokens)}, {found.hit_percent:.1f} % from cache",
        "output tokens": format_count(found.output_tokens),
    }
    if found.tokens_per_s:
        facts["tokens a second"] = format_count(found.tokens_per_s)
    if found.last_answer_s is not None:
        facts["last answer"] = f"{format_duration(found.last_answer_s)} ago"
    if found.seconds_left is not None:
        facts["time left"] = format_duration(found.seconds_left)
    facts["starts"] = found.starts
    return facts
