"""The batch script of a run: what Slurm is asked for, and the lines of bash around the shell code of `slurm/lib/`."""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hpckv
from hpckv.errors import ConfigError, MissingInputError
from hpckv.workload.runfile import ContainerConfig, RunConfig, SlurmConfig, slurm_seconds

LIBRARY = ("common.sh", "continue.sh", "runtime.sh")
_SIGNAL_S = 120
_NOT_PASSED_ON = ("--wrap", "--parsable", "--test-only", "--wait", "-W", "--help", "-h", "--usage", "--version", "-V")
"""sbatch would print something else than a job, or wait for it."""


@dataclass(frozen=True)
class BatchScript:
    """One job, before it is a text."""

    config: RunConfig
    folder: Path
    """Of this submission, absolute; in the run directory."""
    python: str
    """Of the host."""
    start: Path
    """Where the command was given: names in the run file are relative to it."""

    @property
    def slurm(self) -> SlurmConfig:
        return self.config.slurm or SlurmConfig()

    @property
    def container(self) -> ContainerConfig:
        return self.config.container or ContainerConfig()

    @property
    def run_folder(self) -> Path:
        return self.start / self.config.output

    @property
    def worker_python(self) -> str:
        """The host's, or the image's."""
        return self.container.python if self.container.image else self.python

    @property
    def options(self) -> dict[str, Any]:
        """sbatch's options by their long names, None where the site decides. Raises `ConfigError` for what a script cannot say."""
        slurm = self.slurm
        asked: dict[str, Any] = {
            "account": slurm.account,
            "partition": slurm.partition,
            "qos": slurm.qos,
            "time": slurm.time,
            "nodes": slurm.nodes,
            "ntasks": self.num_tasks,
            "cpus-per-task": slurm.cpus_per_task,
            "constraint": slurm.constraint,
            "gres": slurm.gres,
            "gpus-per-node": slurm.gpus_per_node,
            "mem": slurm.mem,
            "tmp": slurm.tmp,
            "job-name": slurm.job_name,
            "dependency": slurm.dependency,
            "reservation": slurm.reservation,
            "array": slurm.array,
            "signal": f"B:USR1@{self.signal_s}",
            "open-mode": "append",  # a start after a requeue does not overwrite the log
            # Where requeue is forbidden a script that allows it may be refused, and a chain must not be requeued as well.
            "requeue" if slurm.continuation == "requeue" else "no-requeue": True,
        }
        if self.num_tasks % slurm.nodes == 0:
            asked["ntasks-per-node"] = self.num_tasks // slurm.nodes
        for name, value in asked.items():
            if "\n" in str(value):
                raise ConfigError(f"slurm.{name.replace('-', '_')}: a line's end in it cannot be told to Slurm")
        for name in slurm.omit:
            if name not in asked:
                near = difflib.get_close_matches(name, asked, 1)
                raise ConfigError(
                    f"slurm.omit: {name} is not asked for{f'; did you mean {near[0]!r}?' if near else ''}"
                )
            asked[name] = None
        return asked

    @property
    def logs(self) -> dict[str, str]:
        """Where the job's output goes; Slurm's patterns hold in what was given, not in the run directory's name."""
        pattern = "%x-%A_%a.log" if self.slurm.array is not None else "%x-%j.log"
        folder = str(self.run_folder / "logs").replace("%", "%%")
        found = {"output": self.slurm.log or f"{folder}/{pattern}"}
        return found | ({"error": self.slurm.error} if self.slurm.error else {})

    @property
    def num_tasks(self) -> int:
        """As many as `parallel:` has ranks."""
        wanted, ranks = self.slurm.ntasks, self.config.parallel.num_ranks
        if wanted not in (None, ranks):
            raise ConfigError(f"slurm.ntasks: {wanted}, but parallel: has {ranks} ranks (tp x pp x replicas)")
        if ranks < self.slurm.nodes:
            raise ConfigError(
                f"slurm.nodes: {self.slurm.nodes}, but parallel: has {ranks} ranks: some nodes would idle"
            )
        return ranks

    @property
    def signal_s(self) -> int:
        """Seconds before the end; in a short job there must be time before them."""
        limit = self.slurm.limit_s or math.inf
        return self.slurm.signal_s or int(max(1, min(_SIGNAL_S, limit / 4)))

    @property
    def header(self) -> list[str]:
        """Further #SBATCH lines, of the options after `--`."""
        check_options(self.slurm.sbatch)
        return [f"#SBATCH {shlex.join(self.slurm.sbatch)}"] if self.slurm.sbatch else []

    @property
    def arguments(self) -> list[str]:
        """What only sbatch's command line can hold: a log in a folder with a line's end in its name."""
        return [f"--{name}={value}" for name, value in self.logs.items() if "\n" in value]

    @property
    def setup(self) -> list[str]:
        """Lines of bash before the step."""
        return [
            *self.header,
            f"cd -- {shlex.quote(str(self.start))} || exit 66",
            *self.variables,
            *self.slurm.setup,
            f". {shlex.quote(str(self.folder / 'lib' / LIBRARY[0]))} || exit 66",
        ]

    @property
    def variables(self) -> list[str]:
        """For the shell code alone: exported they would be settings of a run that is submitted from inside this job."""
        slurm, container = self.slurm, self.container
        elapsed = slurm.max_elapsed
        if elapsed and math.isinf(slurm_seconds(str(elapsed))):
            elapsed = None
        values = {
            "HPCKV_RUN_DIR": self.run_folder,
            "HPCKV_SIF": self.start / container.image if container.image else None,
            "HPCKV_RUNTIME": container.runtime,
            "HPCKV_BIND": ",".join(container.bind) or None,
            "HPCKV_MPI": slurm.mpi,
            "HPCKV_CONTINUE": slurm.continuation,
            "HPCKV_ATTEMPTS": slurm.attempts,
            "HPCKV_MAX_ELAPSED": elapsed,
            "HPCKV_MAX_POINTS": slurm.max_points,
            "HPCKV_POINTS_PER_NODE_HOUR": slurm.points_per_node_hour,
        }
        lines = [f"hpckv_folder={shlex.quote(str(self.folder))}"]
        lines += [_array("hpckv_sbatch", self.arguments)] if self.arguments else []
        lines += [_array("hpckv_srun", slurm.srun)] if slurm.srun else []
        lines += [_array("hpckv_paths", self.paths)] if container.image else []
        return lines + [f"export -n {name}={_text(value)}" for name, value in values.items()]

    @property
    def paths(self) -> list[str]:
        """What a container has to see, besides the run directory."""
        config = self.config
        store = config.store
        names = [config.input, config.model.path, config.site, store and store.shared]
        found = [self.start / name for name in names if name]
        model = self.start / config.model.path
        # Folders of a Hugging Face cache hold links to files that lie elsewhere.
        links = [file.resolve().parent for file in model.glob("*") if file.is_symlink()] if model.is_dir() else []
        there = [next(path for path in (one, *one.parents) if path.is_dir()) for one in (*found, *links)]
        # Only the node knows whether it has them.
        local = [n for n in (store.site_local, store.local) if n and n not in ("auto", "none")] if store else []
        return list(dict.fromkeys([*map(str, there), *local]))


def check_options(options: Sequence[str]) -> None:
    """Raise `ConfigError` for what is no option of sbatch, or one that would keep it from submitting."""
    if options and not options[0].startswith("-"):
        raise ConfigError(f"{options[0]}: not expected; options of sbatch stand after -- and begin with -")
    for option in options:
        if "\n" in option:
            raise ConfigError(f"{option!r}: a line's end in it cannot be told to Slurm")
        if option.partition("=")[0] in _NOT_PASSED_ON:
            raise ConfigError(
                f"{option}: hpckv submit has --dry-run, --parsable and --wait of its own, sbatch's do not go"
            )


def array_indexes(array: int | str | None) -> list[int]:
    """Of `0-3`, `1,5`, `0-7:2%4`, in order; none if it is no array."""
    found: list[int] = []
    for part in str(array).partition("%")[0].split(",") if array is not None else ():
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return found


def library() -> Path:
    """The folder of the shell code; raises `MissingInputError`."""
    folder = Path(hpckv.__file__).parents[1] / "slurm" / "lib"
    if not (folder / LIBRARY[0]).exists():
        raise MissingInputError(f"{folder}: no such folder; hpckv submit needs hpckv's checkout (pip install -e)")
    return folder


def _array(name: str, values: Sequence[str]) -> str:
    return f"{name}=({' '.join(map(shlex.quote, values))})"


def _text(value: object) -> str:
    text = f"{value:f}" if isinstance(value, float) else str(value)
    return "" if value is None else shlex.quote(text)
