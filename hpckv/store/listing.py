"""Folders as they were last seen: listed again only when they may have changed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

_TICK_S = 2.0
"""A folder is listed until its mtime has stood for so long by this process's own clock: it may stand for two changes."""


@dataclass
class Listing:
    """One folder as it was last seen."""

    changed_ns: int = -1
    since: float = 0.0
    """When this mtime was first seen."""
    is_settled: bool = False
    names: set[str] = field(default_factory=set)

    def look(self, folder: Path, suffix: str) -> bool:
        """List again if the folder changed; whether it was listed. Raises `OSError`."""
        now = time.monotonic()
        try:
            changed = folder.stat().st_mtime_ns
        except FileNotFoundError:
            found, changed = set[str](), -1
        else:
            if changed == self.changed_ns and self.is_settled:
                return False
            found = {entry.name for entry in os.scandir(folder) if entry.name.endswith(suffix)}
        if changed != self.changed_ns:
            self.since = now
        self.names, self.changed_ns = found, changed
        self.is_settled = changed != -1 and now - self.since > _TICK_S
        return True


@dataclass
class OwnerListing:
    """One user's part of the namespace."""

    uid: int
    segments: Listing = field(default_factory=Listing)
    indexes: Listing = field(default_factory=Listing)
    covered: set[str] = field(default_factory=set)
    """Segments that an index file lists."""
    waiting: dict[str, float] = field(default_factory=dict)
    """Listed segments whose keys are not known, and when to look at them, by the monotonic clock."""
