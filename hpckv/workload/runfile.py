"""The run file: every setting of a run, from YAML, environment and flags. No torch.

Precedence: flag > `HPCKV_*` environment > run file > site file > default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpckv.comm.parallel_dims import ParallelConfig
from hpckv.engine.config import EngineConfig
from hpckv.engine.request import SamplingParams
from hpckv.errors import CapabilityError, ConfigError
from hpckv.kvcache.config import CacheConfig
from hpckv.model.config import ModelSettings
from hpckv.schema import Config, convert, read_yaml, set_dotted
from hpckv.store.config import StoreConfig


class SlurmConfig(Config, frozen=True):
    """What to ask Slurm for (`slurm:`); read by `hpckv submit`, of no effect on `hpckv run`."""

    account: str | None = None
    """`-A`"""
    partition: str | None = None
    """`-p`"""
    qos: str | None = None
    """`-q`"""
    time: str | None = None
    """`-t`, for example "02:00:00"."""
    nodes: int = 1
    """`-N`"""
    gpus_per_node: int | None = None
    """`--gpus-per-node`"""
    constraint: str | None = None
    """`-C`"""


class ContainerConfig(Config, frozen=True):
    """Image and runtime of the workers (`container:`); read by `hpckv submit`, of no effect on `hpckv run`."""

    image: str | None = None
    """Apptainer image, a `.sif` file."""
    runtime: str = "apptainer"
    """`apptainer`, `singularity` or `charliecloud`."""
    bind: list[str] = []
    """Further folders to bind."""


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
    slurm: SlurmConfig | None = None
    container: ContainerConfig | None = None
    site: str | None = None
    """Site file; its `defaults:` section holds run file sections of lower precedence."""


_ENVIRONMENT = {
    "HPCKV_STORE": "store.shared",
    "HPCKV_LOCAL": "store.local",
    "HPCKV_RUN_DIR": "output",
    "HPCKV_SITE": "site",
    "HPCKV_SIF": "container.image",
}


def load_run(
    path: Path,
    *,
    flags: Mapping[str, str | None] | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> RunConfig:
    """Read a run file and everything that overrides it; raises `ConfigError` or `MissingInputError`, one line each.

    `flags` are dotted names and their values or None; `sets` are `a.b=c` texts.
    """
    content = read_yaml(path)
    for name, dotted in _ENVIRONMENT.items():
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
        content = _merge(_site_defaults(site), content)
    config = convert(content, RunConfig, str(path))
    if config.parallel.replicas > 1:
        raise CapabilityError(
            f"parallel.replicas: {config.parallel.replicas} is not in this version of hpckv; one replica of tp x pp ranks is"
        )
    return config


def _site_defaults(site: object) -> dict[str, Any]:
    if not isinstance(site, str):
        raise ConfigError(f"site: expected the path of a site file, got {site!r}")
    defaults = read_yaml(Path(site)).get("defaults", {})
    if not isinstance(defaults, dict):
        raise ConfigError(f"{site}: defaults: expected run file sections")
    return defaults


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _set(content: dict[str, Any], dotted: str, value: str) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content = content[section]
    content[key] = value
