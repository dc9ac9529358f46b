"""What segments there are, of whom, and where each block lies: one namespace's view of the users' folders.

A look-up asks memory only. `refresh()` lists folders whose mtime changed, reads the owners' index files, and the key
tables of the segments that no index covers. Whatever cannot be read is passed over with a warning.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hpckv.log import warn_once
from hpckv.store.block import Box
from hpckv.store.block_index import BlockIndex, Entries
from hpckv.store.durable import publish
from hpckv.store.fetch import for_each
from hpckv.store.foreign_file import UnusableFileError, is_gone
from hpckv.store.index_file import IndexedSegment, IndexFile
from hpckv.store.layout import StoreLayout
from hpckv.store.segment import Segment, SegmentContext

_log = logging.getLogger(__name__)

_READERS = 8
_TICK_S = 2.0
"""A folder is listed until its mtime has stood for so long by this process's own clock: it may stand for two changes."""
_RETRY_S = 60.0
"""A segment that could not be read is looked at again after so long, while its folder lists it."""
INDEX_FROM = 16
"""An owner's segments are consolidated when so many are in no index file."""


@dataclass
class _Listing:
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
class _Owner:
    """One user's part of the namespace."""

    uid: int
    segments: _Listing = field(default_factory=_Listing)
    indexes: _Listing = field(default_factory=_Listing)
    covered: set[str] = field(default_factory=set)
    """Segments that an index file lists."""
    waiting: dict[str, float] = field(default_factory=dict)
    """Listed segments whose keys are not known, and when to look at them, by the monotonic clock."""


class Catalog:
    """Segments and blocks of one namespace over all trusted users."""

    def __init__(
        self,
        layout: StoreLayout,
        context: SegmentContext,
        *,
        trusted_uids: frozenset[int] | None = None,
        distrusted_uids: Iterable[int] = (),
    ) -> None:
        """`trusted_uids` None trusts every owner of a folder of their own, except `distrusted_uids`."""
        self._distrusted = set(distrusted_uids)
        self.layout, self._context, self._trusted = layout, context, trusted_uids
        self._namespace = layout.namespace_name(context.namespace, context.epoch)
        self._lock = threading.RLock()
        self._refreshing = threading.Lock()
        self._indexes: dict[Box, BlockIndex] = {}
        self._owners: dict[int, _Owner] = {}
        self._numbers: dict[Path, int] = {}
        self._paths: dict[int, Path] = {}
        self._boxes: dict[int, Box] = {}
        self._next_number = 0

    def __len__(self) -> int:
        """Entries: a block counts once for every segment that has it or a box of it."""
        with self._lock:
            return sum(map(len, self._indexes.values()))

    @property
    def index_bytes(self) -> int:
        """Memory of the index."""
        return sum(index.num_bytes for index in self._indexes.values())

    @property
    def segments(self) -> list[Path]:
        with self._lock:
            return list(self._numbers)

    def trusted_owner(self, path: Path) -> frozenset[int]:
        """Who must own a segment: the one whose folder it lies in."""
        return frozenset({int(path.relative_to(self.layout.users).parts[0])})

    def _owner_of(self, path: Path) -> _Owner:
        (uid,) = self.trusted_owner(path)
        return self._owners.setdefault(uid, _Owner(uid))

    def own_folder(self, uid: int) -> Path:
        return self.layout.segments(uid, self._namespace)

    def own_indexes(self, uid: int) -> Path:
        return self.layout.indexes(uid, self._namespace)

    def present(self, keys: Sequence[bytes]) -> np.ndarray:
        """Whether segments whose boxes together cover this rank's are believed to have each block, (n,) bool; no I/O."""
        with self._lock:
            found = {box: index.present(keys) for box, index in self._indexes.items() if len(index)}
        return _covered(self._context.geometry.box, found, len(keys))

    def places(self, key: bytes) -> list[tuple[Path, int]]:
        """Every (segment, row) that may hold a part of this rank's box of the block; whole ones first."""
        own = self._context.geometry.box
        with self._lock:
            boxes = sorted((box for box in self._indexes if _overlap(box, own)), key=lambda box: not _holds(box, own))
            places = [place for box in boxes for place in self._indexes[box].places(key)]
            return [(self._paths[number], row) for number, row in places]

    def add(self, path: Path, keys: np.ndarray, box: Box) -> None:
        """A segment this process has just published or read."""
        with self._lock:
            if path not in self._numbers:
                self._index(box).add(Entries.of_segment(self._number(path, box), keys))

    def forget(self, path: Path, *, for_good: bool = False) -> None:
        """Its blocks are not looked for any more. The file is looked at again in a while, if it is still there; or never."""
        with self._lock:
            self._owner_of(path).waiting[path.name] = math.inf if for_good else time.monotonic() + _RETRY_S
            number = self._numbers.pop(path, None)
            if number is not None:
                self._index(self._boxes.pop(number)).remove(number)
                del self._paths[number]

    def distrust(self, uid: int) -> None:
        """Use nothing of this user's any more."""
        self._distrusted.add(uid)
        self._drop_distrusted()

    def _drop_distrusted(self) -> None:
        folders = {self.own_folder(uid) for uid in self._distrusted}
        for path in self.segments if folders else ():
            if path.parent in folders:
                self.forget(path)

    def refresh(self) -> None:
        """Look for what came and went since the last time."""
        with self._refreshing:
            for uid in self._users():
                owner = self._owners.setdefault(uid, _Owner(uid))
                try:
                    self._refresh_owner(owner)
                except OSError as error:
                    warn_once(_log, f"{self.own_folder(uid)}: {error.strerror}; its blocks are not used")
            self._drop_distrusted()  # those that were distrusted meanwhile

    def consolidate(self, uid: int, *, at_least: int = INDEX_FROM, gid: int | None = None) -> Path | None:
        """Write an index file of all segments of `uid` (this user) if `at_least` of them are in none; raises `OSError`.

        It must get the group `gid`.
        """
        folder, target = self.own_folder(uid), self.own_indexes(uid)
        with self._lock:
            own = [path for path in self._numbers if path.parent == folder]
            owner = self._owners.setdefault(uid, _Owner(uid))
            if len([p for p in own if p.name not in owner.covered]) < max(1, at_least):
                return None
            old = sorted(owner.indexes.names)
            numbers = np.array([self._numbers[path] for path in own])
            boxes = [self._boxes[number] for number in numbers.tolist()]
            entries = Entries.merge([index.entries() for index in self._indexes.values()])
        # Numbers of this process become numbers of the file; other users' entries are left out.
        order = np.argsort(numbers)
        at = np.searchsorted(numbers[order], entries.segments).clip(max=len(numbers) - 1)
        chosen = entries.select(numbers[order][at] == entries.segments, order[at])
        counts = np.bincount(chosen.segments, minlength=len(own)).tolist()
        file = IndexFile(
            segments=[
                IndexedSegment(bytes.fromhex(p.stem), n, box) for p, n, box in zip(own, counts, boxes, strict=True)
            ],
            entries=chosen,
            supersedes=[bytes.fromhex(Path(name).stem) for name in old],
        )
        target.mkdir(parents=True, exist_ok=True)
        path = target / f"{secrets.token_hex(16)}.idx"
        publish(path, file.build(self._context), gid=gid)
        for name in old:  # readers that hold the old listing find a file gone, and look at the segments instead
            with contextlib.suppress(OSError):
                (target / name).unlink()
        owner.covered = {p.name for p in own}
        return path

    def _users(self) -> Iterable[int]:
        """Owners of a folder that bears their uid; others' folders are passed over."""
        try:
            found = [entry for entry in os.scandir(self.layout.users) if entry.name.isdecimal()]
        except OSError as error:
            warn_once(_log, f"{self.layout.users}: {error.strerror}; its blocks are not used")
            return
        for entry in found:
            uid = int(entry.name)
            if uid in self._distrusted or (self._trusted is not None and uid not in self._trusted):
                continue
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode) and status.st_uid == uid:
                    yield uid

    def _refresh_owner(self, owner: _Owner) -> None:
        folder = self.own_folder(owner.uid)
        before = owner.segments.names
        is_listed = owner.segments.look(folder, ".h5")
        with self._lock:
            if is_listed:
                for name in before - owner.segments.names:
                    self.forget(folder / name)
                waiting = [name for name in owner.segments.names if folder / name not in self._numbers]
                owner.waiting = {name: owner.waiting.get(name, 0.0) for name in waiting}
            now = time.monotonic()
            due = {name for name, at in owner.waiting.items() if at <= now}
        if due:
            left = self._read_indexes(owner, folder, due)
            for_each(lambda name: self._read_segment(folder / name), left, _READERS)

    def _read_indexes(self, owner: _Owner, folder: Path, new: set[str]) -> list[str]:
        """Take what index files say about `new` segments, if there are index files that were not seen yet.

        Returns the segments that they do not speak of.
        """
        indexes = self.own_indexes(owner.uid)
        try:
            if not owner.indexes.look(indexes, ".idx"):
                return sorted(new)
        except OSError as error:
            warn_once(_log, f"{indexes}: {error.strerror}; the segments are looked at instead")
            return sorted(new)
        files: dict[str, IndexFile] = {}
        for name in owner.indexes.names:
            try:
                files[name] = IndexFile.read(indexes / name, self._context, frozenset({owner.uid}))
            except FileNotFoundError:
                continue
            except (UnusableFileError, OSError) as error:
                warn_once(_log, f"{indexes / name}: {error}; the segments are looked at instead")
        superseded = {name.hex() for file in files.values() for name in file.supersedes}
        for name, file in files.items():
            if Path(name).stem in superseded:
                continue
            names = [f"{segment.name.hex()}.h5" for segment in file.segments]
            owner.covered.update(names)
            of_file = file.entries.segments
            with self._lock:
                for box in {segment.box for segment in file.segments}:
                    is_wanted = np.array([s.box == box and n in new for s, n in zip(file.segments, names, strict=True)])
                    numbers = np.array(
                        [w and self._number(folder / n, box) for w, n in zip(is_wanted, names, strict=True)]
                    )
                    self._index(box).add(file.entries.select(is_wanted[of_file], numbers[of_file]))
            new.difference_update(names)
        return sorted(new)

    def _read_segment(self, path: Path) -> None:
        try:
            segment = Segment(path, self._context, self.trusted_owner(path))
        except (UnusableFileError, OSError) as error:
            if not is_gone(error):
                warn_once(_log, f"{path}: {error}; its blocks are not used")
            self.forget(path, for_good=isinstance(error, UnusableFileError))
            return
        segment.close()
        self.add(path, segment.keys, segment.geometry.box)

    def _index(self, box: Box) -> BlockIndex:
        return self._indexes.setdefault(box, BlockIndex())

    def _number(self, path: Path, box: Box) -> int:
        number = self._numbers[path] = self._next_number
        self._paths[number], self._boxes[number] = path, box
        self._owner_of(path).waiting.pop(path.name, None)
        self._next_number += 1
        return number


def _covered(wanted: Box, found: dict[Box, np.ndarray], count: int) -> np.ndarray:
    """Where boxes that have a block cover the wanted one; `found` says for each box which of `count` blocks it has."""
    whole = np.zeros(count, dtype=bool)
    for box, has in found.items():
        if _holds(box, wanted):
            whole |= has
    partial = {box: has for box, has in found.items() if _overlap(box, wanted) and not _holds(box, wanted)}
    if not partial or whole.all():
        return whole
    # Cells between the boxes' edges: each must be in some box that has the block.
    covered = np.ones(count, dtype=bool)
    for h0, h1 in _cells(wanted[:2], [box[:2] for box in partial]):
        for l0, l1 in _cells(wanted[2:], [box[2:] for box in partial]):
            holders = [has for box, has in partial.items() if _holds(box, (h0, h1, l0, l1))]
            covered &= np.any(holders, axis=0) if holders else False
    return whole | covered


def _cells(span: tuple[int, ...], cuts: Iterable[tuple[int, ...]]) -> list[tuple[int, int]]:
    edges = sorted({*span, *(edge for cut in cuts for edge in cut if span[0] < edge < span[1])})
    return list(itertools.pairwise(edges))


def _holds(box: Box, inner: Box) -> bool:
    return box[0] <= inner[0] and inner[1] <= box[1] and box[2] <= inner[2] and inner[3] <= box[3]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
