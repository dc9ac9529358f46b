"""What Slurm knows of a job, by whichever of its commands answers here: `sacct`, `squeue`, `scontrol`, or none of them."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

_log = logging.getLogger(__name__)

_PATIENCE_S = 20.0
_OPEN_STATES = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "CONFIGURING", "COMPLETING", "RESIZING")
_MAY_COME_BACK = ("PREEMPTED", "NODE_FAIL")
"""What `sacct` calls a start until it hears of the next."""


@dataclass(frozen=True)
class JobState:
    """One job (of its last start, if it was requeued)."""

    job: str
    state: str
    """In Slurm's words; `UNKNOWN` where Slurm cannot be asked or has forgotten it."""
    elapsed: str = ""
    exit_code: str = ""
    reason: str = ""
    """Why it is pending, or the nodes it runs on."""

    @property
    def is_unknown(self) -> bool:
        """Whether Slurm has no word of it."""
        return self.state == "UNKNOWN"

    @property
    def is_open(self) -> bool:
        """Whether it runs or will run."""
        return self.state.startswith(_OPEN_STATES)


def job_states(jobs: Sequence[str], *, with_tasks: bool = False) -> list[JobState]:
    """In the order given. Asks Slurm once, each way, for all jobs; where sites close `sacct` the others have the living ones.

    Of those the controller's word counts: the accounting database hears of a start later. A task of an array is known as
    ARRAY_TASK and by its own number. `with_tasks` a number is an array's, if it can be, and stands for all its tasks; those
    that wait together are one, `7_[4-9]`.
    """
    found = {state.job: state for state in _sacct(jobs, with_tasks)}
    if living := [job for job in jobs if job not in found or found[job].is_open]:
        if queued := _squeue(living, with_tasks):  # tasks that waited together may have begun by now
            found = {name: state for name, state in found.items() if "[" not in name}
        found |= {state.job: state for state in queued}
    if away := [job for job in jobs if job in found and found[job].state.startswith(_MAY_COME_BACK)]:
        found |= {state.job: state for state in _squeue(away, with_tasks) if state.is_open}
    names = {job: [job] for job in jobs}
    if with_tasks:
        names |= {job: tasks for job in jobs if (tasks := [name for name in found if name.startswith(f"{job}_")])}
    if missing := [job for job in jobs if not found.keys() & names[job]]:
        found |= {state.job: state for state in _scontrol(missing)}
    wanted = dict.fromkeys(name for job in jobs for name in names[job])
    return [found.get(name, JobState(name, "UNKNOWN")) for name in wanted]


def cancel(job: str) -> str:
    """Ask Slurm to end a job, or an array one of whose waiting tasks it is; what it said against it."""
    done = _run(["scancel", job.partition("_[")[0]])
    return "scancel is not here" if done is None else done.stderr.strip()


def _sacct(jobs: Sequence[str], with_tasks: bool) -> list[JobState]:
    columns = "JobID,JobIDRaw,State,Elapsed,ExitCode,NodeList"
    return _states(jobs, _rows(["sacct", "-n", "-X", "-P", "-j", ",".join(jobs), "-o", columns], 6), with_tasks)


def _squeue(jobs: Sequence[str], with_tasks: bool) -> list[JobState]:
    rows = _rows(["squeue", "-h", "-a", "-j", ",".join(jobs), "-t", "all", "-o", "%i|%A|%T|%M||%R"], 6)
    return _states(jobs, rows, with_tasks)


def _scontrol(jobs: Sequence[str]) -> list[JobState]:
    found = []
    for job in jobs:
        done = _run(["scontrol", "--oneliner", "show", "job", job])
        if done is None or done.returncode:
            continue
        shown = dict(part.partition("=")[::2] for part in done.stdout.split())
        values = [shown.get(name, "") for name in ("JobState", "RunTime", "ExitCode", "NodeList")]
        found.append(JobState(job, *values))
    return found


def _states(jobs: Sequence[str], rows: Sequence[Sequence[str]], with_tasks: bool) -> list[JobState]:
    """Of rows that begin with a job's two numbers, ARRAY_TASK and its own; one of an array's tasks has the array's own."""
    if with_tasks:
        arrays = tuple(f"{job}_" for job in jobs)
        return [JobState(row[0], *row[2:]) for row in rows if row[0] in jobs or row[0].startswith(arrays)]
    return [JobState(name, *row[2:]) for row in rows for name in row[:2] if name in jobs]


def _rows(command: list[str], columns: int) -> list[list[str]]:
    done = _run(command)
    lines = done.stdout.splitlines() if done and not done.returncode else []
    return [row for line in lines if len(row := line.split("|")) == columns]


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        _log.warning("%s gives no answer in %g s", command[0], _PATIENCE_S)
        return None
