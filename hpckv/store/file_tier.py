"""Blocks in sealed segments under one folder: the form every file tier shares.

Writing collects blocks in an open segment in memory; a thread seals it (builds the file, fsyncs, publishes) when it
is full or old. A lookup touches no file: every process holds an index of the key tables of all segments, refreshed
when a directory's mtime has changed. Owners other than this user are not trusted in this version.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from pathlib import Path

from hpckv.log import warn_once
from hpckv.store.durable import publish
from hpckv.store.segment import Segment, SegmentContext, SegmentError, StoredBlock, build_segment
from hpckv.store.tier import PutOutcome, Tier, TierStats

_log = logging.getLogger(__name__)

_SEALING_AT_ONCE = 2
_OPEN_FILES = 256


class FileTier(Tier):
    """Segments of one namespace in `folder`; `own` is the subfolder this user writes to."""

    survives_process = True

    def __init__(
        self,
        folders: Path,
        own: Path,
        context: SegmentContext,
        *,
        name: str = "shared",
        segment_bytes: int = 128 * 1024**2,
        seal_s: float = 60.0,
        refresh_s: float = 5.0,
        is_read_only: bool = False,
    ) -> None:
        """`folders` is the store's `u/` directory, whose */seg/NAMESPACE folders are read."""
        self.name = name
        self.geometry = context.geometry
        self.stats = TierStats()
        self._users, self._own, self._context = folders, own, context
        self._segment_bytes, self._seal_s, self._refresh_s = segment_bytes, seal_s, refresh_s
        self._index: dict[bytes, tuple[Path, int]] = {}
        self._listed: dict[Path, int] = {}
        self._refused: set[Path] = set()
        self._files: OrderedDict[Path, Segment] = OrderedDict()
        self._known: set[Path] = set()
        self._pins: Counter[Path] = Counter()
        self._lock = threading.RLock()
        self._open: dict[bytes, StoredBlock] = {}
        self._opened_at = 0.0
        self._sealing: list[dict[bytes, StoredBlock]] = []
        self._is_writing = not is_read_only
        self._work: queue.Queue[dict[bytes, StoredBlock] | None] = queue.Queue()
        self._sealer: threading.Thread | None = None
        self._next_refresh = 0.0
        self.refresh()

    def __len__(self) -> int:
        return len(self._index) + len(self._open)

    def contains(self, key: bytes) -> bool:
        if time.monotonic() > self._next_refresh:
            self.refresh()
        return key in self._index or self._unsealed(key) is not None

    def get(self, key: bytes, into: memoryview) -> bool:
        start = time.perf_counter()
        try:
            if (block := self._unsealed(key)) is not None:
                into[:] = block.payload
            elif not self._read(key, into):
                return False
        finally:
            self.stats.read_s += time.perf_counter() - start
        self.stats.hits += 1
        self.stats.read_bytes += self.geometry.block_bytes
        return True

    def _read(self, key: bytes, into: memoryview) -> bool:
        with self._lock:
            place = self._index.get(key)
        if place is None:
            self.stats.misses["absent"] += 1
            return False
        path, row = place
        cause = "io"
        for _ in range(2):  # one more try with a fresh descriptor: the first may be stale
            try:
                self._segment(path).read(row, into)
                return True
            except FileNotFoundError:
                cause = "gone"
            except SegmentError as error:
                cause = "damaged"
                warn_once(_log, f"{path.name}: {error}; its blocks are computed again")
            except OSError as error:
                warn_once(_log, f"{path.name}: {error.strerror}; its blocks are computed again")
            self._forget_file(path)
        self.stats.misses[cause] += 1
        with self._lock:
            self._refused.add(path)
            for stale in [k for k, (p, _) in self._index.items() if p == path]:
                del self._index[stale]
        return False

    def put(self, block: StoredBlock) -> PutOutcome:
        payload = bytes(block.payload)
        assert len(payload) == self.geometry.block_bytes
        with self._lock:
            if block.key in self._index or self._unsealed(block.key) is not None:
                return PutOutcome.DUPLICATE
            if not self._is_writing or len(self._sealing) >= _SEALING_AT_ONCE:
                self.stats.dropped += 1
                return PutOutcome.DROPPED
            if not self._open:
                self._opened_at = time.monotonic()
                self._start_sealer()
            self._open[block.key] = StoredBlock(block.key, block.parent, block.position, payload)
            self.stats.stored += 1
            if len(self._open) * self.geometry.block_bytes >= self._segment_bytes:
                self._seal_open()
        return PutOutcome.STORED

    def flush(self) -> None:
        with self._lock:
            if self._open:
                self._seal_open()
        self._work.join()

    def pin(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            self._pins.update(self._index[k][0] for k in keys if k in self._index)

    def unpin(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            self._pins.subtract(self._index[k][0] for k in keys if k in self._index)
            self._pins = +self._pins

    def evict(self, num_bytes: int) -> int:
        """Delete own unpinned segments, oldest first; others' files are theirs."""
        freed = 0
        with self._lock:
            own = sorted((p for p in self._known if p.parent == self._own), key=_mtime)
            for path in own:
                if freed >= num_bytes:
                    break
                if self._pins[path]:
                    continue
                for key in [k for k, (p, _) in self._index.items() if p == path]:
                    del self._index[key]
                self._forget_file(path)
                self._known.discard(path)
                try:
                    freed += path.stat().st_size
                    path.unlink()
                except OSError:
                    continue  # somebody else's collector was faster
        return freed

    def close(self) -> None:
        self.flush()
        if self._sealer is not None:
            self._work.put(None)
            self._sealer.join()
            self._sealer = None
        with self._lock:
            for path in list(self._files):
                self._forget_file(path)

    def refresh(self) -> None:
        """Index segments that appeared since the last look, and forget those that went."""
        self._next_refresh = time.monotonic() + self._refresh_s
        namespace = self._context.namespace.hex()
        with self._lock:  # the sealing thread adds to it
            known = set(self._known)
        present: set[Path] = set()
        for folder in [*self._users.glob(f"*/seg/{namespace}")]:
            try:
                changed = folder.stat().st_mtime_ns
                if self._listed.get(folder) == changed:
                    present.update(p for p in known if p.parent == folder)
                    continue
                found = [Path(e.path) for e in os.scandir(folder) if e.name.endswith(".h5")]
            except OSError as error:
                warn_once(_log, f"{folder}: {error.strerror}; its blocks are not used")
                continue
            present.update(found)
            for path in found:
                self._add_segment(path)
            # A change within the same clock tick as this listing must be seen next time.
            self._listed[folder] = changed if time.time_ns() - changed > 2_000_000_000 else -1
        with self._lock:
            for path in known - present:
                self._forget_file(path)
                self._known.discard(path)
                for key in [k for k, (p, _) in self._index.items() if p == path]:
                    del self._index[key]

    def _add_segment(self, path: Path) -> None:
        if path in self._known or path in self._refused:
            return
        try:
            segment = Segment(path, self._context, frozenset({os.getuid()}))
        except (SegmentError, OSError) as error:
            warn_once(_log, f"{path}: {error}; its blocks are not used")
            self._refused.add(path)
            return
        with self._lock:
            self._known.add(path)
            for row, key in enumerate(segment.keys):
                self._index.setdefault(key, (path, row))
            self._keep_open(path, segment)

    def _segment(self, path: Path) -> Segment:
        with self._lock:
            if path in self._files:
                self._files.move_to_end(path)
                return self._files[path]
        segment = Segment(path, self._context, frozenset({os.getuid()}))
        with self._lock:
            self._keep_open(path, segment)
        return segment

    def _keep_open(self, path: Path, segment: Segment) -> None:
        self._files[path] = segment
        while len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close()

    def _forget_file(self, path: Path) -> None:
        with self._lock:
            if segment := self._files.pop(path, None):
                segment.close()

    def _unsealed(self, key: bytes) -> StoredBlock | None:
        with self._lock:
            for blocks in (self._open, *self._sealing):
                if key in blocks:
                    return blocks[key]
        return None

    def _start_sealer(self) -> None:
        if self._sealer is None:
            self._sealer = threading.Thread(target=self._seal_loop, name=f"hpckv-seal-{self.name}", daemon=True)
            self._sealer.start()

    def _seal_open(self) -> None:
        """Hand the open segment to the sealing thread; called with the lock held."""
        self._sealing.append(self._open)
        self._work.put(self._open)
        self._open = {}

    def _seal_if_old(self) -> None:
        with self._lock:
            if self._open and time.monotonic() - self._opened_at > self._seal_s:
                self._seal_open()

    def _seal_loop(self) -> None:
        while True:
            try:
                blocks = self._work.get(timeout=min(1.0, max(0.02, self._seal_s)))
            except queue.Empty:
                self._seal_if_old()
                continue
            if blocks is None:
                self._work.task_done()
                return
            try:
                self._seal(blocks)
            except Exception as error:  # noqa: BLE001 - any failure here only costs a later recomputation
                self._give_up_writing(len(blocks), error)
            finally:
                with self._lock:
                    self._sealing.remove(blocks)
                self._work.task_done()

    def _give_up_writing(self, num_lost: int, error: Exception) -> None:
        with self._lock:
            self._is_writing = False
            self.stats.dropped += num_lost
        reason = error.strerror if isinstance(error, OSError) else error
        _log.warning("store %s: %s; nothing more is written to it in this run", self._own, reason)

    def _seal(self, blocks: dict[bytes, StoredBlock]) -> None:
        rows = list(blocks.values())
        data = build_segment(self._context, rows)
        path = self._own / f"{secrets.token_hex(16)}.h5"
        publish(path, [data])
        with self._lock:
            self._known.add(path)
            self.stats.written_bytes += len(data)
            for row, block in enumerate(rows):
                self._index.setdefault(block.key, (path, row))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
