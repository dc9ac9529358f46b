"""What a store holds and how it is used: every segment's size, age and heat. Files are looked at once, folders again."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpckv.store.foreign_file import open_trusted
from hpckv.store.layout import StoreLayout
from hpckv.store.ownership import is_of_user

HEAT_EVERY_S = 600.0
"""A running process tells so often what it has read."""
HALF_LIFE_S = 7 * 86400.0
"""A use counts half after so long."""


@dataclass(frozen=True)
class StoredFile:
    """One file below a user's folder."""

    path: Path
    uid: int
    kind: str
    """`segment`, `index`, `heat`, `audit`, `identity`, `salt`, `ledger`, `temporary` or `other`."""
    num_bytes: int
    written_at: float

    @property
    def namespace(self) -> str:
        return self.path.parent.name


@dataclass(frozen=True)
class Use:
    """How much a segment was read."""

    heat: float = 0.0
    """Blocks read from it, each halved every `HALF_LIFE_S`."""
    last: float = 0.0
    """When, seconds since 1970; 0 is never."""
    keep_s: int = 0
    """How long its owner wants it kept after its last use, seconds; 0 leaves it to the store."""

    def __add__(self, other: Use) -> Use:
        return Use(self.heat + other.heat, max(self.last, other.last), max(self.keep_s, other.keep_s))


class Survey:
    """All files of a store's users, and the totals that quotas speak of."""

    def __init__(self, layout: StoreLayout) -> None:
        self._layout = layout
        self.files: dict[Path, StoredFile] = {}

    def refresh(self) -> None:
        """List every folder again; files are immutable, so only new ones are looked at."""
        present: dict[Path, StoredFile] = {}
        for uid, folder in users(self._layout):
            for path in _walk(folder):
                known = self.files.get(path)
                if known is None:
                    with contextlib.suppress(OSError):
                        status = path.lstat()
                        if stat.S_ISREG(status.st_mode) and is_of_user(status, uid):
                            known = StoredFile(path, uid, _kind(path), status.st_size, status.st_mtime)
                if known is not None:
                    present[path] = known
        self.files = present

    def segments(self, uid: int | None = None) -> list[StoredFile]:
        return [f for f in self.files.values() if f.kind == "segment" and uid in (None, f.uid)]

    def num_bytes(self, uid: int | None = None) -> int:
        return sum(f.num_bytes for f in self.files.values() if uid in (None, f.uid))

    def num_files(self, uid: int | None = None) -> int:
        return sum(uid in (None, f.uid) for f in self.files.values())

    def free_bytes(self) -> int:
        """What the filesystem has left for this user."""
        found = os.statvfs(self._layout.root)
        return found.f_bavail * found.f_frsize

    def uses(self, now: float | None = None, *, of: Iterable[StoredFile] | None = None) -> dict[Path, Use]:
        """Every segment's use, by all users' heat logs or those given. What they say only orders; it is not verified."""
        now = time.time() if now is None else now
        found: dict[Path, Use] = {}
        for file in self.files.values() if of is None else of:
            if file.kind != "heat":
                continue
            for name, use in read_heat(file.path, file.uid, now):
                path = self._layout.users / name
                found[path] = found.get(path, Use()) + use
        return found


def users(layout: StoreLayout) -> Iterator[tuple[int, Path]]:
    """(uid, folder) of those that bear their owner's uid as a name; whatever else lies there is passed over."""
    try:
        entries = [entry for entry in os.scandir(layout.users) if entry.name.isdecimal()]
    except FileNotFoundError:
        return
    for entry in entries:
        with contextlib.suppress(OSError):
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode) and is_of_user(status, int(entry.name)):
                yield int(entry.name), Path(entry.path)


def heat_record(reads: Mapping[str, float], now: float, keeps: Mapping[str, int] | None = None) -> bytes:
    """A heat file: blocks read of each segment until `now`, and how long own ones are to be kept, seconds.

    Segments are named as `UID/seg/NAMESPACE/NAME.h5`.
    """
    return json.dumps({"v": 1, "time": now, "reads": reads, "keeps": keeps or {}}).encode()


def merged_heat_record(uses: Mapping[str, Use], now: float) -> bytes:
    """The heat file that stands for several, each segment with the time of its own last use."""
    read = {name: use for name, use in uses.items() if use.heat}
    return json.dumps(
        {
            "v": 1,
            "time": now,
            "reads": {name: use.heat / _aged(now - use.last) for name, use in read.items()},
            "times": {name: use.last for name, use in read.items()},
            "keeps": {name: use.keep_s for name, use in uses.items() if use.keep_s},
        }
    ).encode()


def _aged(seconds: float) -> float:
    """What is left of a use after so long."""
    return float(0.5 ** (max(0.0, seconds) / HALF_LIFE_S))


def read_heat(path: Path, uid: int, now: float) -> Iterable[tuple[str, Use]]:
    """What a heat file says, aged to `now`; nothing if it cannot be read."""
    try:
        fd, _ = open_trusted(path, frozenset({uid}))
        with os.fdopen(fd, "rb") as file:
            content = json.loads(file.read())
        uses = {}
        for name, count in content["reads"].items():
            at = min(now, float(content.get("times", {}).get(name, content["time"])))
            uses[str(name)] = Use(float(count) * _aged(now - at), at)
        for name, keep_s in content.get("keeps", {}).items():
            if name.startswith(f"{uid}/"):  # nobody decides about another's
                uses[name] = uses.get(name, Use()) + Use(keep_s=int(keep_s))
        return uses.items()
    except Exception:  # noqa: BLE001 - whatever somebody has written there
        return []


def _walk(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path))
            else:
                yield Path(entry.path)


def _kind(path: Path) -> str:
    if path.name.startswith(".tmp-"):
        return "temporary"
    if path.suffix == ".json":
        return "identity" if path.stem == "identity" else "audit" if path.parent.name == "audit" else "heat"
    return {".h5": "segment", ".idx": "index", ".salt": "salt", ".jsonl": "ledger"}.get(path.suffix, "other")
