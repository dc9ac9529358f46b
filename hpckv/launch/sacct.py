"""What Slurm's accounting has of jobs, start by start: `sacct`, asked once and read without guessing."""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence

from hpckv.errors import SlurmError
from hpckv.usage.reconcile import SlurmStart

_PATIENCE_S = 120.0
"""A month of a large site's jobs takes a while."""
_AT_ONCE = 1000
"""Jobs named in one command."""
_STEPS = frozenset({"hpckv", "hpckv-run"})
"""What a step of `hpckv run` is called: by srun, after the program; by our batch scripts."""
_FIELDS = (
    *("JobIDRaw", "JobID", "JobName", "Cluster", "UID", "User", "Account", "Partition", "QOS", "State", "ExitCode"),
    *("Start", "End", "ElapsedRaw", "AllocTRES", "ConsumedEnergyRaw", "Restarts", "Comment"),
)
_JOB = re.compile(r"\d{1,18}(_\d{1,18})?")
_GPUS = re.compile(r"(?:^|,)gres/gpu(:[^,=]+)?=(\d+)")


def starts_between(start: float, end: float, uids: Sequence[int]) -> list[SlurmStart]:
    """Of jobs of these users that were there in [start, end), seconds since 1970, as far as one may see them.

    Raises `SlurmError` if `sacct` is not here, closed, or does not answer.
    """
    return list(_starts(["-S", _local(start), "-E", _local(end), "-u", ",".join(map(str, uids))]))


def starts_of(jobs: Sequence[str]) -> list[SlurmStart]:
    """All of these jobs, whenever they were; numbers as Slurm's own, of a task of an array its own. Raises `SlurmError`."""
    found: list[SlurmStart] = []
    jobs = [job for job in jobs if _JOB.fullmatch(job)]  # for a word that is no job sacct refuses all of them
    for first in range(0, len(jobs), _AT_ONCE):
        found += _starts(["-a", "-j", ",".join(jobs[first : first + _AT_ONCE])])
    return found


def cluster_name() -> str | None:
    """This one's, as jobs know it; None if Slurm does not say."""
    try:
        shown = _run(["scontrol", "show", "config"])
    except SlurmError:
        return None
    found = re.search(r"^ClusterName\s*=\s*(\S+)", shown, re.MULTILINE)
    return found[1] if found else None


def _starts(arguments: Sequence[str]) -> Iterator[SlurmStart]:
    known = {name.lower() for name in _run(["sacct", "--helpformat"]).split()}
    fields = [name for name in _FIELDS if name.lower() in known]
    # Names and comments are whatever their users wrote, lines' ends included: nobody can write what is not known before.
    mark = f"|{secrets.token_hex(8)}|"
    shown = _run(["sacct", "-D", "-p", "-n", f"--delimiter={mark}", "-o", ",".join(fields), *arguments])
    last: SlurmStart | None = None
    for row in _rows(shown, mark, len(fields)):
        values = dict(zip(fields, row, strict=True))
        if "." not in values["JobIDRaw"]:
            if last:
                yield last
            last = _start(values)
        elif last and values["JobIDRaw"].partition(".")[0] == last.job and values["JobName"] in _STEPS:
            last = dataclasses.replace(last, is_ours=True)
    if last:
        yield last


def _rows(text: str, mark: str, num_fields: int) -> Iterator[list[str]]:
    """Every field ends with a mark, and every row with a line's end after it."""
    cells = text.split(mark)[:-1]
    for first in range(0, len(cells), num_fields):
        row = cells[first : first + num_fields]
        yield [row[0].removeprefix("\n"), *row[1:]]


def _start(values: dict[str, str]) -> SlurmStart:
    energy, restarts = values.get("ConsumedEnergyRaw", ""), values.get("Restarts", "")
    return SlurmStart(
        cluster=values["Cluster"],
        job=values["JobIDRaw"],
        job_id=values["JobID"],
        uid=int(values["UID"] or -1),
        user=values["User"],
        account=values["Account"],
        partition=values["Partition"],
        qos=values["QOS"],
        state=values["State"].partition(" ")[0],  # CANCELLED by 1000
        exit_code=values["ExitCode"],
        start=_seconds(values["Start"]),
        end=_seconds(values["End"]),
        elapsed_s=int(values["ElapsedRaw"] or 0),
        gpus=_gpus(values["AllocTRES"]),
        energy_j=float(energy) if energy.isdecimal() and int(energy) else None,
        comment=values.get("Comment", ""),
        restarts=int(restarts) if restarts.isdecimal() else None,
        is_ours=False,
    )


def _gpus(tres: str) -> int:
    """A site may track GPUs together, by kind, or both."""
    of_kinds = [(kind, int(count)) for kind, count in _GPUS.findall(tres)]
    together = [count for kind, count in of_kinds if not kind]
    return together[0] if together else sum(count for _, count in of_kinds)


def _seconds(text: str) -> float | None:
    return float(text) if text.isdecimal() and int(text) else None  # Unknown, None


def _local(t: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(max(0.0, t)))


def _run(command: list[str]) -> str:
    """What it prints; raises `SlurmError` with what it said against it."""
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]} is not here: there is nothing to set the ledger beside")
    environ = {**os.environ, "SLURM_TIME_FORMAT": "%s"}  # not the local time, which an hour of autumn has twice
    for name in ("SACCT_FORMAT", "SLURM_CLUSTERS", "SACCT_FEDERATION", "SACCT_LOCAL"):
        environ.pop(name, None)
    try:
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} gives no answer in {_PATIENCE_S:g} s") from None
    except OSError as error:
        raise SlurmError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SlurmError(f"{command[0]} cannot be used: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout
