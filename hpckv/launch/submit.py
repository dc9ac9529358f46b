"""`hpckv submit`: check everything, write down what was resolved, and hand the run to Slurm or to this machine. No torch.

What is submitted lies in a folder of its own in the run directory, `RUN/submit/TIME-RANDOM/`, that only its owner can open:
a pickle is code to whoever loads it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from hpckv.errors import CannotWriteError, CapabilityError, ConfigError, InputError, MissingInputError
from hpckv.launch.folder import CONFIG, FLAGS, JOBS, REQUESTS
from hpckv.launch.local_jobs import note_local_job
from hpckv.launch.script import LIBRARY, BatchScript, array_indexes, check_options, library
from hpckv.model import read_config
from hpckv.schema import to_plain
from hpckv.workload.lines import read_batch
from hpckv.workload.runfile import RunConfig, SlurmConfig, load_run

_log = logging.getLogger(__name__)

Executor = Literal["slurm", "local", "debug"]

_EFFECTIVE_HERE = {
    "local": {"time", "signal_s", "gpus_per_node", "ntasks", "nodes", "setup"},
    "debug": {"ntasks", "nodes", "setup"},
}
_VARIABLES: dict[str, tuple[str, Callable[[str], object]]] = {
    "HPCKV_CONTINUE": ("slurm.continuation", str),
    "HPCKV_ATTEMPTS": ("slurm.attempts", int),
    "HPCKV_MAX_ELAPSED": ("slurm.max_elapsed", str),
    "HPCKV_MAX_POINTS": ("slurm.max_points", float),
    "HPCKV_POINTS_PER_NODE_HOUR": ("slurm.points_per_node_hour", float),
    "HPCKV_MPI": ("slurm.mpi", str),
    "HPCKV_RUNTIME": ("container.runtime", str),
    "HPCKV_BIND": ("container.bind", lambda text: [part for part in text.split(",") if part]),
}
"""Of the shell code, here too; those of a whole run are `runfile.ENVIRONMENT`."""


@dataclass(frozen=True)
class SubmitOptions:
    """What flags say beside the run file."""

    executor: Executor | None = None
    run_flags: Sequence[str] = ()
    """Of `hpckv run`: `--skip-bad-lines`, `--allow-errors`, `--join`."""

    @property
    def skips_bad_lines(self) -> bool:
        return "--skip-bad-lines" in self.run_flags


@dataclass(frozen=True)
class Prepared:
    """Checked, nothing written yet."""

    script: BatchScript
    executor: Executor
    num_requests: int
    run_flags: Sequence[str]

    @property
    def text(self) -> str:
        """The whole script."""
        if self.executor != "slurm":
            return "\n".join(["#!/bin/bash", *self.script.setup, 'hpckv_here "$@"', ""])
        from hpckv.launch.executors import render

        return render(self.script)


@dataclass(frozen=True)
class Submitted:
    """On its way."""

    prepared: Prepared
    job: str
    """Slurm's number, or the process of a local job."""
    local: Any = None
    """submitit's local job."""

    @property
    def folder(self) -> Path:
        return self.prepared.script.folder


def load_submit(
    path: Path,
    *,
    flags: Mapping[str, object],
    sets: Sequence[str] = (),
    sbatch: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> RunConfig:
    """The run file with all that overrides it: `load_run`, and the variables of the shell code. Raises `ConfigError`."""
    check_options(sbatch)
    config = load_run(path, flags={**_from_variables(environ), **_given(flags)}, sets=sets, environ=environ)
    slurm = config.slurm or SlurmConfig()
    return msgspec.structs.replace(config, slurm=msgspec.structs.replace(slurm, sbatch=[*slurm.sbatch, *sbatch]))


def prepare(config: RunConfig, options: SubmitOptions, start: Path, *, needs_slurm: bool = True) -> Prepared:
    """Check what can be checked on a login node, before anything is written or submitted; raises `HpckvError`."""
    executor = options.executor or "slurm"
    if executor == "slurm" and needs_slurm and not shutil.which("sbatch"):
        raise CapabilityError("no sbatch on this machine; --executor local runs it here")
    stamp = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"
    folder = Path(os.path.normpath(start / config.output)) / "submit" / stamp
    script = BatchScript(config, folder, sys.executable, start)
    script.options  # noqa: B018 # says what is wrong with them
    _check_places(script)
    if executor != "slurm":
        _check_here(script, executor)
    flags = list(options.run_flags)
    if script.slurm.array is not None and "--join" not in flags:
        flags.append("--join")  # jobs of an array work on one run
    read_config(start / config.model.path)
    return Prepared(script, executor, _check_input(config, options, start), flags)


def submit(prepared: Prepared, environ: Mapping[str, str] = os.environ) -> Submitted:
    """Write the submit folder and submit; raises `CannotWriteError`, `SlurmError`. Does not return from the debug executor."""
    script = prepared.script
    try:
        _write_folder(prepared)
    except OSError as error:
        raise CannotWriteError(f"{error.filename or script.folder}: {error.strerror}") from None
    from hpckv.launch import executors

    if prepared.executor == "debug":
        executors.run_here(script)
    if prepared.executor == "local":
        job = executors.submit_here(script, environ)
        note_local_job(script.folder, int(job.job_id))
        return Submitted(prepared, str(job.job_id), job)
    try:
        number = executors.submit_to_slurm(script, environ)
    except BaseException:
        shutil.rmtree(script.folder, ignore_errors=True)  # nothing went off
        raise
    with (script.folder / JOBS).open("a") as file:  # its first start may have added the next already
        file.write(f"{number}\n")
    return Submitted(prepared, number)


def _given(flags: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in flags.items() if value is not None}


def _from_variables(environ: Mapping[str, str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, (dotted, kind) in _VARIABLES.items():
        if text := environ.get(name):
            try:
                found[dotted] = kind(text)
            except ValueError:
                raise ConfigError(f"{name}={text}: not a number") from None
    return found


def _check_places(script: BatchScript) -> None:
    config, start = script.config, script.start
    if re.search(r"%[jtaA]", str(script.folder)):
        raise ConfigError(f"output: {script.run_folder}: % with j, t, a or A stands for a job's number in such a name")
    if "\\" in script.logs["output"]:
        raise ConfigError(
            f"slurm.log: {script.logs['output']}: with a backslash Slurm takes % for itself; give another -o"
        )
    if config.container and config.container.image and not (start / config.container.image).exists():
        raise MissingInputError(f"container.image: {config.container.image}: no such image")
    try:
        array_indexes(script.slurm.array)
    except ValueError:
        raise ConfigError(f"slurm.array: {script.slurm.array}: expected numbers, for example 0-3 or 0-15%4") from None
    for bind in script.container.bind:
        if not Path(bind.partition(":")[0]).is_absolute() or "," in bind:
            raise ConfigError(f"container.bind: {bind}: expected /SOURCE[:/TARGET[:OPTIONS]], without commas")
    library()


def _check_here(script: BatchScript, executor: Executor) -> None:
    """What of Slurm's a machine alone does not have."""
    slurm = script.slurm
    for name, value in (("array", slurm.array), ("dependency", slurm.dependency)):
        if value is not None:
            raise ConfigError(f"slurm.{name}: only Slurm has that; --executor {executor} does not")
    if slurm.nodes > 1:
        raise ConfigError(f"slurm.nodes: {slurm.nodes}, and --executor {executor} has this one")
    if executor == "debug" and script.num_tasks > 1:
        raise ConfigError(f"parallel: has {script.num_tasks} ranks, and --executor debug is one process")
    default, known = SlurmConfig(), _EFFECTIVE_HERE[executor]
    for name in slurm.__struct_fields__:
        if getattr(slurm, name) != getattr(default, name) and name not in known:
            _log.warning("slurm.%s has no effect with --executor %s", name, executor)


def _check_input(config: RunConfig, options: SubmitOptions, start: Path) -> int:
    batch = read_batch(start / config.input, config.sampling)
    if batch.bad and not options.skips_bad_lines:
        first = batch.bad[0]
        more = f" ({len(batch.bad)} bad lines in all; --skip-bad-lines answers the rest)" if len(batch.bad) > 1 else ""
        raise InputError(f"{config.input}:{first.number}: {first.reason}{more}")
    return len(batch.lines) + len(batch.bad)


def _write_folder(prepared: Prepared) -> None:
    script = prepared.script
    folder = script.folder
    (script.run_folder / "logs").mkdir(parents=True, exist_ok=True)  # a log without a folder ends a job without a word
    for log in script.logs.values():
        if "%" not in (parent := os.path.dirname(log)):  # noqa: PTH120 # a pattern is no path
            (script.start / parent).mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, parents=True)
    folder.chmod(0o700)  # whatever the umask
    (folder / "lib").mkdir()
    for name in LIBRARY:  # as it is now: bash reads a script while it runs, and the checkout may change
        shutil.copyfile(library() / name, folder / "lib" / name)
    _write(folder / CONFIG, yaml.safe_dump(to_plain(script.config), sort_keys=False, allow_unicode=True))
    _write(folder / FLAGS, json.dumps(list(prepared.run_flags)))
    _write(folder / REQUESTS, f"{prepared.num_requests}\n")
    if prepared.executor != "slurm":
        _write(folder / "here.sh", prepared.text)
        _write(folder / "python.json", json.dumps([script.worker_python]))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
