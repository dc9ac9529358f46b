"""What an output was made with: model digest, versions, hardware, topology, seeds. Written beside the answers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from typing import TYPE_CHECKING, Any

import hpckv
from hpckv.workload.runfile import RunConfig

if TYPE_CHECKING:
    from hpckv.engine.engine import Engine

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "h5py", "blake3")


def provenance(config: RunConfig, engine: Engine) -> dict[str, Any]:
    """For `provenance.json`; written when the run starts, and again with the final counts at its end."""
    return {
        "hpckv": hpckv.__version__,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": {
            "path": config.model.path,
            "architecture": engine.model_config.architecture,
            "weights_blake3": engine.rank.weights_digest,
            "dtype": engine.rank.dtype_name,
            "quantization": config.model.quantization,
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "device": {
            "kind": engine.rank.capability.kind,
            "name": engine.rank.capability.name,
            "class": engine.rank.capability.arithmetic_class,
        },
        "host": platform.node(),
        "container": os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "topology": {"tp": config.parallel.tp, "pp": config.parallel.pp, "replicas": config.parallel.replicas},
        "hosts_of_ranks": [member.host for member in engine.rank.world.members] or [platform.node()],
        "stage_ends": list(engine.rank.dims.stage_ends) or [engine.model_config.num_layers],
        "numerics": config.engine.numerics,
        "seed": config.engine.seed,
        "bridged_blocks": engine.bridged_blocks,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
