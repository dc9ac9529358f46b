"""Logger set-up: plain lines on standard error, with the Slurm job and rank where there is one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

_warned: set[str] = set()


def setup(verbosity: int = 0, environ: Mapping[str, str] = os.environ) -> None:
    """Send the package's log to stderr: -1 warnings only, 0 progress, 1 and more debug."""
    level = {-1: logging.WARNING, 0: logging.INFO}.get(max(-1, verbosity), logging.DEBUG)
    origin = ""
    if "SLURM_JOB_ID" in environ:
        origin = f" [{environ['SLURM_JOB_ID']}.{environ.get('SLURM_PROCID', '0')}]"
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s{origin} %(levelname).1s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("hpckv")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False


def to_file(path: Path) -> None:
    """Send the package's log to the end of a file instead."""
    handler = logging.FileHandler(path)
    root = logging.getLogger("hpckv")
    handler.setFormatter(root.handlers[0].formatter if root.handlers else None)
    root.handlers[:] = [handler]


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning the first time this very message is given."""
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)
