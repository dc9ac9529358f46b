"""What Slurm knows of a job, by whichever of its commands answers here: `sacct`, `squeue`, `scontrol`, or none of them."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_log = logging.getLogger(__name__)

_PATIENCE_S = 20.0
_OPEN_STATES = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "CONFIGURING", "COMPLETING", "RESIZING")


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
    def is_open(self) -> bool:
        """Whether it runs or will run."""
        return self.state.startswith(_OPEN_STATES)


def job_states(jobs: Sequence[str]) -> list[JobState]:
    """In the order given. Asks Slurm once, each way, for all jobs; where sites close `sacct` the others have the living ones.

    Of those the controller's word counts: the accounting database hears of a start later. An array is its tasks, and those that
    wait together are one, `7_[4-9]`.
    """
    found = {state.job: state for state in _sacct(jobs)}
    if living := [job for job in jobs if job not in found or found[job].is_open]:
        # Tasks that waited together may have begun by now.
        found = {name: state for name, state in found.items() if "[" not in name}
        found |= {state.job: state for state in _squeue(living)}
    if missing := [job for job in jobs if not _tasks(job, found)]:
        found |= {state.job: state for state in _scontrol(missing)}
    named = [name for job in jobs for name in _tasks(job, found) or [job]]
    return [found.get(name, JobState(name, "UNKNOWN")) for name in dict.fromkeys(named)]


def _tasks(job: str, found: Iterable[str]) -> list[str]:
    """What was found of a job: itself, or an array's tasks."""
    return [name for name in found if name == job or name.startswith(f"{job}_")]


def cancel(job: str) -> str:
    """Ask Slurm to end a job, or an array one of whose waiting tasks it is; what it said against it."""
    done = _run(["scancel", job.partition("_[")[0]])
    return "scancel is not here" if done is None else done.stderr.strip()


def _sacct(jobs: Sequence[str]) -> list[JobState]:
    columns = "JobID,State,Elapsed,ExitCode,NodeList"
    rows = _rows(["sacct", "-n", "-X", "-P", "-j", ",".join(jobs), "-o", columns], 5)
    asked = tuple(f"{job}_" for job in jobs)
    return [JobState(row[0], *row[1:]) for row in rows if row[0] in jobs or row[0].startswith(asked)]


def _squeue(jobs: Sequence[str]) -> list[JobState]:
    rows = _rows(["squeue", "-h", "-a", "-j", ",".join(jobs), "-t", "all", "-o", "%i|%T|%M|%R"], 4)
    return [JobState(job, state, elapsed, "", reason) for job, state, elapsed, reason in rows]


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
