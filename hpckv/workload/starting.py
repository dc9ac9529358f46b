"""When the parts of a start began, from the batch script to the first answer; `bench/first_token.py` adds them up."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_VARIABLE = "HPCKV_TIMES"
"""`script=SECONDS step=SECONDS task=SECONDS`, seconds since 1970, set by `slurm/lib/` where a batch script started this process."""


class Starting:
    """Moments of this start, seconds since 1970, in order."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """What the batch script noted, and when this process began."""
        self.begun = time.monotonic()
        self.times: dict[str, float] = {}
        for word in environ.get(_VARIABLE, "").split():
            name, _, seconds = word.partition("=")
            with suppress(ValueError):
                self.times[name] = float(seconds)
        self.times["process"] = process_start()
        self.mark("run")

    def mark(self, name: str) -> None:
        """This is now."""
        self.times[name] = time.time()

    @property
    def seconds(self) -> float:
        """Since the run began in this process."""
        return time.monotonic() - self.begun

    @property
    def process_seconds(self) -> float:
        """Since this process began."""
        return time.time() - self.times["process"]

    @property
    def record(self) -> dict[str, float]:
        """Plain data."""
        return {name: round(seconds, 3) for name, seconds in self.times.items()}


def process_start() -> float:
    """When this process was made, as its kernel knows it, to a hundredth of a second."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks, up = int(fields[19]) / os.sysconf("SC_CLK_TCK"), time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time() - up + ticks
