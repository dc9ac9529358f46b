"""The machine around a measured pass: whether it is quiet before, what is stolen during, and a page cache without files."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

STEAL_LIMIT = 5.0
"""Percent of the machine's time stolen during a pass, above which the pass is rejected."""
BUSY_LIMIT = 15.0
"""Percent of the machine's time that others use just before a pass, above which the pass is rejected."""
_LOOK_S = 0.4


@dataclass(frozen=True)
class Ticks:
    """/proc/stat's counters so far."""

    stolen: int
    busy: int
    all: int

    @classmethod
    def now(cls) -> Ticks:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, idle, iowait, irq, softirq, stolen = map(int, file.readline().split()[1:9])
        busy = user + nice + system + irq + softirq + stolen
        return cls(stolen, busy, busy + idle + iowait)

    def percent_since(self, name: str, before: Ticks) -> float:
        """The share of `name` since then."""
        return 100 * (getattr(self, name) - getattr(before, name)) / max(1, self.all - before.all)


def wait_for_quiet(patience_s: float) -> float:
    """Wait until the machine has nothing else to do, no longer than `patience_s`; percent busy at the last look."""
    give_up = time.monotonic() + patience_s
    while True:
        before = Ticks.now()
        time.sleep(_LOOK_S)
        busy = Ticks.now().percent_since("busy", before)
        if busy <= BUSY_LIMIT or time.monotonic() > give_up:
            return busy


def is_kept(row: dict) -> bool:
    """The rule, fixed before any run and the same for everybody."""
    return row["steal_percent"] <= STEAL_LIMIT and row["busy_before_percent"] <= BUSY_LIMIT


def drop_cache(folder: Path) -> None:
    """Nothing below `folder` is in the page cache any more; as root, nothing at all is."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
