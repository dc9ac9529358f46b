"""The run file: every setting of a run, from YAML, environment and flags. No torch.

Precedence: flag > `HPCKV_*` environment > run file > site file > default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from hpckv.comm.parallel_dims import ParallelConfig
from hpckv.engine.config import EngineConfig
from hpckv.engine.request import SamplingParams
from hpckv.errors import ConfigError
from hpckv.kvcache.config import CacheConfig
from hpckv.model.config import ModelSettings
from hpckv.quantity import ByteSize
from hpckv.schema import Config, convert, read_site, read_yaml, set_dotted
from hpckv.store.config import StoreConfig
from hpckv.workload.queue import QueueConfig


class SlurmConfig(Config, frozen=True):
    """What to ask Slurm for, and what to do when the time is up (`slurm:`); read by `hpckv submit`, of no effect on `hpckv run`."""

    account: str | None = None
    """`-A`: the project that pays."""
    partition: str | None = None
    """`-p`"""
    qos: str | None = None
    """`-q`"""
    time: int | str | None = None
    """`-t`, in quotes, for example "02:00:00"; the partition's default unless given."""
    nodes: int = 1
    """`-N`"""
    ntasks: int | None = None
    """`-n`: ranks. As many as `parallel:` has, which is the default."""
    cpus_per_task: int | None = None
    """`-c`"""
    constraint: str | None = None
    """`-C`; for a model over several nodes "[v100|a100]" with brackets, which are all of one kind."""
    gres: str | None = None
    """`--gres`, for example "gpu:a100:4"."""
    gpus_per_node: int | str | None = None
    """`--gpus-per-node`, a number or for example "a100:4"."""
    mem: int | str | None = None
    """`--mem`, of each node."""
    tmp: int | str | None = None
    """`--tmp`: room on each node's own disk. `store.local_size` is no more than that, also for `hpckv run`."""
    job_name: str = "hpckv"
    """`-J`"""
    log: str | None = None
    """`-o` (`--output` is the run directory): the job's log, `logs/%x-%j.log` in the run directory unless given."""
    error: str | None = None
    """`-e`: standard error, in the log unless given."""
    dependency: str | None = None
    """`-d`"""
    reservation: str | None = None
    """`--reservation`"""
    array: int | str | None = None
    """`-a`: so many jobs work on the run together (`hpckv run --join`)."""
    signal_s: int | None = None
    """So many seconds before the end the run is told to stop (`--signal`); 120, or a quarter of `time` if that is less."""
    mpi: str | None = None
    """What `srun --mpi=` is given; pmi2 where `srun` has it, else none: ranks then meet by Slurm's variables."""
    setup: list[str] = []
    """Lines of bash before anything else, for example `module load apptainer`."""
    sbatch: list[str] = []
    """Further options of sbatch, like those after `--` on the command line."""
    omit: list[str] = []
    """Options that the site's sbatch refuses, by their long names, for example `ntasks-per-node`: left out of the script."""
    srun: list[str] = []
    """Further options of srun."""
    continuation: Literal["requeue", "chain", "none"] = "requeue"
    """When the time is up and requests are left: `requeue` the job; `chain`: submit the next one, where requeue is forbidden."""
    attempts: int = 20
    """So many starts at most. Two starts in a row without a new answer end it sooner."""
    max_elapsed: int | str | None = None
    """Time of all starts together, as `time`; the run stops when it is used up."""
    max_points: float | None = None
    """Points of all starts together; the run stops when they are spent."""
    points_per_node_hour: float | None = None
    """What a node costs an hour; belongs into the site file."""

    def __post_init__(self) -> None:
        given = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        for name in ("nodes", "ntasks", "cpus_per_task", "attempts", "signal_s"):
            if given.get(name, 1) < 1:
                raise ConfigError(f"slurm.{name}: {given[name]} is not at least 1")
        for name in ("max_points", "points_per_node_hour"):
            if given.get(name, 1) <= 0:
                raise ConfigError(f"slurm.{name}: {given[name]:g} is not above 0")
        for name in ("time", "max_elapsed"):
            _check_time(name, given.get(name, "1"))
        for name in ("mem", "tmp"):
            if not _SLURM_SIZE.fullmatch(str(given.get(name, "1"))):
                raise ConfigError(f"slurm.{name}: {given[name]!r} is no size as Slurm writes it, for example 64G")
        if self.max_points is not None and self.points_per_node_hour is None:
            raise ConfigError("slurm.max_points: needs slurm.points_per_node_hour, which the site file may have")
        if self.signal_s and self.limit_s and self.signal_s >= self.limit_s:
            raise ConfigError(f"slurm.signal_s: {self.signal_s} s before the end of {self.time} is before its start")

    @property
    def tmp_bytes(self) -> int:
        """Of `tmp`, which Slurm takes in MiB; 0 asks for nothing."""
        found = _SLURM_SIZE.fullmatch(str(self.tmp or 0))
        assert found is not None
        power = " KMGT".index((found[2] or "M").upper())
        return int(found[1]) * int(1024**power)

    @property
    def limit_s(self) -> float | None:
        """Seconds of `time`."""
        return None if self.time is None else slurm_seconds(str(self.time))


_SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_SLURM_SIZE = re.compile(r"(\d+)([KMGT]?)B?", re.IGNORECASE)


def slurm_seconds(time: str) -> float:
    """Of a time as Slurm writes it: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S, UNLIMITED; 0 if it is none of these."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    found = _SLURM_TIME.fullmatch(time)
    if found is None:
        return 0
    parts = [int(part) for part in found.group("first", "second", "third") if part is not None]
    if found["days"] is None and len(parts) < 3:
        parts.insert(0, 0)  # minutes first
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_time(name: str, value: int | str) -> None:
    if isinstance(value, int):  # to YAML 12:00:00 is 43200
        raise ConfigError(f'slurm.{name}: {value} is a number; write the time in quotes, for example "12:00:00"')
    if slurm_seconds(value) < 1:
        raise ConfigError(f"slurm.{name}: {value!r} is no time as Slurm writes it, for example 90 or 1-12:00:00")


class ContainerConfig(Config, frozen=True):
    """Image and runtime of the workers (`container:`); read by `hpckv submit`, of no effect on `hpckv run`."""

    image: str | None = None
    """Apptainer image, a `.sif` file; for Charliecloud a folder or SquashFS."""
    runtime: Literal["auto", "apptainer", "singularity", "charliecloud"] = "auto"
    """`auto` is the first of them that the node has."""
    bind: list[str] = []
    """Further folders to bind, `SOURCE[:TARGET[:OPTIONS]]`; the run's own folders and devices are bound in any case."""
    python: str = "python3"
    """The image's Python that has hpckv."""


class RunConfig(Config, frozen=True):
    """A whole run file."""

    model: ModelSettings
    input: str
    """File of OpenAI Batch lines."""
    output: str
    """The run directory."""
    parallel: ParallelConfig = ParallelConfig()
    cache: CacheConfig = CacheConfig()
    store: StoreConfig | None = None
    engine: EngineConfig = EngineConfig()
    sampling: SamplingParams = SamplingParams()
    queue: QueueConfig = QueueConfig()
    slurm: SlurmConfig | None = None
    container: ContainerConfig | None = None
    site: str | None = None
    """Site file; its `defaults:` section holds run file sections of lower precedence."""


ENVIRONMENT = {
    "HPCKV_STORE": "store.shared",
    "HPCKV_LOCAL": "store.local",
    "HPCKV_RUN_DIR": "output",
    "HPCKV_SITE": "site",
    "HPCKV_SIF": "container.image",
}


def load_run(
    path: Path,
    *,
    flags: Mapping[str, object] | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> RunConfig:
    """Read a run file and everything that overrides it; raises `ConfigError` or `MissingInputError`, one line each.

    `flags` are dotted names and their values or None; `sets` are `a.b=c` texts.
    """
    content = read_yaml(path)
    for name, dotted in ENVIRONMENT.items():
        if value := (environ or {}).get(name):
            if dotted.startswith("store.local") and not content.get("store"):
                continue  # a node-local folder alone asks for no store
            _set(content, dotted, value)
    for dotted, given in (flags or {}).items():
        if given is not None:
            _set(content, dotted, given)
    for assignment in sets:
        set_dotted(content, assignment)
    if site := content.get("site"):
        content = _merge(_below_a_run(_site_defaults(site), content), content)
    return _within_tmp(convert(content, RunConfig, str(path)))


def _within_tmp(config: RunConfig) -> RunConfig:
    """Slurm tells a job nothing of the room it was given, so what was asked for bounds what is taken."""
    store, tmp = config.store, config.slurm.tmp_bytes if config.slurm else 0
    if store is None or not tmp or store.local_size <= tmp:
        return config
    return msgspec.structs.replace(config, store=msgspec.structs.replace(store, local_size=ByteSize(tmp)))


def site_local(environ: Mapping[str, str]) -> str | None:
    """The folder of the nodes' own disks in the site file that HPCKV_SITE names; raises as `load_run`."""
    site = environ.get("HPCKV_SITE")
    store = _below_a_run(_site_defaults(site), {"store": {"shared": "-"}}).get("store") if site else None
    return store.get("site_local") if store else None


def _site_defaults(site: object) -> dict[str, Any]:
    if not isinstance(site, str):
        raise ConfigError(f"site: expected the path of a site file, got {site!r}")
    from hpckv.usage.points import read_points
    from hpckv.usage.rates import read_rates

    read_points(Path(site)), read_rates(Path(site))  # what is wrong there is said before anything is computed
    defaults = read_site(Path(site)).get("defaults") or {}
    if not isinstance(defaults, dict):
        raise ConfigError(f"{site}: defaults: expected run file sections")
    # A section of which every line is commented out.
    found = {name: section for name, section in defaults.items() if section is not None}
    # By themselves, so that a mistake is not said to be the run file's.
    convert(
        _merge({"model": {"path": "-"}, "input": "-", "output": "-"}, _with_store(found)),
        RunConfig,
        f"{site}: defaults",
    )
    return found


def _with_store(sections: dict[str, Any]) -> dict[str, Any]:
    """A site's `store:` may leave the place to runs."""
    store = sections.get("store")
    return {**sections, "store": {"shared": "-", **store}} if isinstance(store, dict) else sections


def _below_a_run(sections: dict[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """A site's `store:` asks for no store where it has no place for one; its node-local folder does not replace the job's own."""
    store = sections.get("store")
    if not isinstance(store, dict):
        return sections
    if "shared" not in store and not content.get("store"):
        return {name: section for name, section in sections.items() if name != "store"}
    if store.get("local", "auto") not in ("auto", "none"):
        kept = {name: value for name, value in store.items() if name != "local"}
        return {**sections, "store": {**kept, "site_local": store["local"]}}
    return sections


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _set(content: dict[str, Any], dotted: str, value: object) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content = content[section]
    content[key] = value
