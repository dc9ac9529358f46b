"""Every start of a run, one line each in `logs/starts*.jsonl`: when, where, in which job, and how many requests there were."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import msgspec

from hpckv.errors import CannotWriteError


class Start(msgspec.Struct):
    """One start."""

    time: float
    """Seconds since 1970."""
    host: str
    pid: int
    requests: int
    """Of the whole run."""
    job: str | None = None
    """Slurm's number, of an array's task as `7_3`."""
    restart: int = 0


def job_of_this_process() -> tuple[str | None, int]:
    """Slurm's number of this job, of an array's task as `7_3`, and how often it was started before."""
    job = os.environ.get("SLURM_JOB_ID")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    return job, int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def note_start(directory: Path, requests: int, worker: str = "") -> None:
    """Add this process; raises `CannotWriteError`.

    A `worker` among several has a file of its own: appending is not safe between nodes.
    """
    job, restart = job_of_this_process()
    start = Start(time.time(), platform.node(), os.getpid(), requests, job, restart)
    name = f"starts-{worker}.jsonl" if worker else "starts.jsonl"
    path = directory / "logs" / name
    try:
        with path.open("ab") as file:
            file.write(msgspec.json.encode(start) + b"\n")
    except OSError as error:
        raise CannotWriteError(f"{path}: {error.strerror}") from None


def read_starts(directory: Path) -> list[Start]:
    """In order of time; a torn line is left out."""
    found = []
    for path in (directory / "logs").glob("starts*.jsonl"):
        for line in path.read_bytes().splitlines():
            try:
                found.append(msgspec.json.decode(line, type=Start))
            except msgspec.DecodeError:
                continue
    return sorted(found, key=lambda start: start.time)
