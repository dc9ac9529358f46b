"""hpckv: batch inference on Slurm clusters that never computes the same prefix twice.

Importing this package imports no torch: the names below are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpckv.engine.engine import Engine
    from hpckv.engine.request import Answer, SamplingParams

__version__ = "0.1.0"
__all__ = ["Answer", "Engine", "SamplingParams", "__version__"]

_HOMES = {"Engine": "hpckv.engine.engine", "SamplingParams": "hpckv.engine.request", "Answer": "hpckv.engine.request"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hpckv' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
