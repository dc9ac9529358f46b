"""What segments there are, of whom, and where each block lies: one namespace's view of the users' folders.

A look-up asks memory only. `refresh()` lists folders whose mtime changed, reads the owners' index files, and the key
tables of the segments that no index covers. Whatever cannot be read is passed over with a warning.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from hpckv.log import warn_once
from hpckv.store.block import Box
from hpckv.store.block_index import BlockIndex, Entries
from hpckv.store.boxes import covered, holds, overlap
from hpckv.store.durable import publish
from hpckv.store.fetch import for_each
from hpckv.store.foreign_file import UnusableFileError, is_gone
from hpckv.store.index_file import IndexedSegment, IndexFile
from hpckv.store.layout import StoreLayout
from hpckv.store.listing import OwnerListing
from hpckv.store.node_index import NodeIndex, View
from hpckv.store.ownership import is_of_user
from hpckv.store.segment import Segment, SegmentContext

_log = logging.getLogger(__name__)

_READERS = 8
_POLL_S = 0.05
_RETRY_S = 60.0
"""A segment that could not be read is looked at again after so long, while its folder lists it."""
INDEX_FROM = 16
"""An owner's segments are consolidated when so many are in no index file."""


class Catalog:
    """Segments and blocks of one namespace over all trusted users."""

    def __init__(
        self,
        layout: StoreLayout,
        context: SegmentContext,
        *,
        trusted_uids: frozenset[int] | None = None,
        distrusted_uids: Iterable[int] = (),
        node: NodeIndex | None = None,
    ) -> None:
        """`trusted_uids` None trusts every owner of a folder of their own, except `distrusted_uids`.

        With `node`, one process of the node looks for all of them.
        """
        self._node = node
        self._published: dict[Path, tuple[Box, np.ndarray]] = {}
        """Of a follower: what it added itself and the leader has not shown yet."""
        self._distrusted = set(distrusted_uids)
        self.layout, self._context, self._trusted = layout, context, trusted_uids
        self._namespace = layout.namespace_name(context.namespace, context.epoch)
        self._lock = threading.RLock()
        self._refreshing = threading.Lock()
        self._indexes: dict[Box, BlockIndex] = {}
        self._owners: dict[int, OwnerListing] = {}
        self._numbers: dict[Path, int] = {}
        self._paths: dict[int, Path] = {}
        self._boxes: dict[int, Box] = {}
        self._next_number = 0
        self._left: set[Path] | None = None
        """What the node's other processes were told last."""

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

    def _owner_of(self, path: Path) -> OwnerListing:
        (uid,) = self.trusted_owner(path)
        return self._owners.setdefault(uid, OwnerListing(uid))

    def own_folder(self, uid: int) -> Path:
        return self.layout.segments(uid, self._namespace)

    def own_indexes(self, uid: int) -> Path:
        return self.layout.indexes(uid, self._namespace)

    def present(self, keys: Sequence[bytes]) -> np.ndarray:
        """Whether segments whose boxes together cover this rank's are believed to have each block, (n,) bool; no I/O."""
        with self._lock:
            found = {box: index.present(keys) for box, index in self._indexes.items() if len(index)}
        return covered(self._context.geometry.box, found, len(keys))

    def places(self, key: bytes) -> list[tuple[Path, int]]:
        """Every (segment, row) that may hold a part of this rank's box of the block; whole ones first."""
        own = self._context.geometry.box
        with self._lock:
            boxes = sorted((box for box in self._indexes if overlap(box, own)), key=lambda box: not holds(box, own))
            places = [place for box in boxes for place in self._indexes[box].places(key)]
            return [(self._paths[number], row) for number, row in places]

    def add(self, path: Path, keys: np.ndarray, box: Box) -> None:
        """A segment this process has just published or read."""
        with self._lock:
            if self._node:
                self._published[path] = box, keys
            if path not in self._numbers:
                self._index(box).add(Entries.of_segment(self._number(path, box), keys))

    def forget(self, path: Path, *, for_good: bool = False) -> None:
        """Its blocks are not looked for any more. The file is looked at again in a while, if it is still there; or never."""
        with self._lock:
            self._owner_of(path).waiting[path.name] = math.inf if for_good else time.monotonic() + _RETRY_S
            self._published.pop(path, None)
            self._drop(path)

    def _drop(self, path: Path) -> None:
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
            if self._node is None:
                self._look()
            elif self._node.leads():
                self._lead(self._node)
            else:
                self._follow(self._node)
            self._drop_distrusted()  # those that were distrusted meanwhile

    def _look(self) -> None:
        for uid in self._users():
            owner = self._owners.setdefault(uid, OwnerListing(uid))
            try:
                self._refresh_owner(owner)
            except Exception as error:  # noqa: BLE001 - whatever one user's files hold concerns nobody else's
                warn_once(_log, f"{self.own_folder(uid)}: {error}; its blocks are not used")

    def _lead(self, node: NodeIndex) -> None:
        """Look, and leave what is there for the node's other processes."""
        self._look()
        with self._lock:
            self._published.clear()
            known = set(self._numbers)
            if known == self._left or not node.may_leave:
                return
            users = self.layout.users
            segments = {n: (str(path.relative_to(users)), self._boxes[n]) for path, n in self._numbers.items()}
            view = View(segments, {box: index.entries() for box, index in self._indexes.items()})
        try:
            node.leave(view)
            self._left = known
        except OSError as error:
            warn_once(_log, f"the node's index: {error.strerror}; every process looks for itself")
            node.close()
            self._node = None

    def _follow(self, node: NodeIndex) -> None:
        """Take over what the leader has left; look for oneself where that cannot be read."""
        try:
            while True:  # the first to start are faster than the leader's first look
                try:
                    view = node.news(again=self._has_due())
                    break
                except FileNotFoundError:
                    if node.leads():
                        return self._lead(node)
                    time.sleep(_POLL_S)
        except (UnusableFileError, OSError) as error:
            warn_once(_log, f"the node's index: {error}; looking for oneself")
            return self._look()
        if view is None:
            return None
        with self._lock:
            self._paths = {n: self.layout.users / name for n, (name, _) in view.segments.items()}
            self._numbers = {path: n for n, path in self._paths.items()}
            self._boxes = {n: box for n, (_, box) in view.segments.items()}
            self._indexes = {box: BlockIndex.of(entries) for box, entries in view.entries.items()}
            self._next_number = max(self._paths, default=-1) + 1
            self._stay_without()
            own, self._published = self._published, {}
            for path, (box, keys) in own.items():
                if path not in self._numbers:
                    self.add(path, keys, box)
        return None

    def _has_due(self) -> bool:
        """Whether something that could not be read is to be tried again."""
        now = time.monotonic()
        with self._lock:
            return any(at <= now for owner in self._owners.values() for at in owner.waiting.values())

    def _stay_without(self) -> None:
        """What this process could not read stays out of a view that has it, until it is to be tried again."""
        now = time.monotonic()
        for owner in self._owners.values():
            for name, at in list(owner.waiting.items()):
                if at > now:
                    self._drop(self.own_folder(owner.uid) / name)
                else:
                    del owner.waiting[name]

    def close(self) -> None:
        """Let another process of the node look; idempotent."""
        if self._node:
            self._node.close()

    def consolidate(self, uid: int, *, at_least: int = INDEX_FROM, gid: int | None = None) -> Path | None:
        """Write an index file of all segments of `uid` (this user) if `at_least` of them are in none; raises `OSError`.

        It must get the group `gid`. Of a node's processes only the one that looks does it.
        """
        if self._node and not self._node.leads():
            return None
        folder, target = self.own_folder(uid), self.own_indexes(uid)
        with self._lock:
            own = [path for path in self._numbers if path.parent == folder]
            owner = self._owners.setdefault(uid, OwnerListing(uid))
            if len([p for p in own if p.name not in owner.covered]) < max(1, at_least):
                return None
            numbers = np.array([self._numbers[path] for path in own])
            boxes = [self._boxes[number] for number in numbers.tolist()]
            entries = Entries.merge([index.entries() for index in self._indexes.values()])
        target.mkdir(parents=True, exist_ok=True)
        old = sorted(entry.name for entry in os.scandir(target) if entry.name.endswith(".idx"))
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
                if stat.S_ISDIR(status.st_mode) and is_of_user(status, uid):
                    yield uid

    def _refresh_owner(self, owner: OwnerListing) -> None:
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

    def _read_indexes(self, owner: OwnerListing, folder: Path, new: set[str]) -> list[str]:
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
            except (UnusableFileError, OSError, MemoryError) as error:
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
