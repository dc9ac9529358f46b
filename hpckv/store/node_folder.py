"""Folders of copies on this node's own disk: how much they may take, who uses them, and what becomes of them when nobody does."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

_SPARE = 0.05
"""Of the disk, that copies leave free."""


def room_in(folder: Path) -> int:
    """Bytes that copies may still take of the disk that `folder` is on; below 0 where others took what they leave free."""
    usage = shutil.disk_usage(folder)
    return usage.free - int(_SPARE * usage.total)


@dataclass(frozen=True)
class Budget:
    """What the copies in `folder` may take: no more than `most`, and no more than there is room for."""

    folder: Path
    most: int

    def excess(self, num_bytes: int) -> int:
        """How many bytes there must go before so many more may come, also for what other processes left; raises `OSError`."""
        taken = 0
        for path in self.folder.iterdir():
            try:
                taken += path.stat().st_size
            except FileNotFoundError:
                continue  # another process evicts as well
        return num_bytes + max(taken - self.most, -room_in(self.folder))
