"""Blocks in sealed segments under a store's users' folders: the form every file tier shares.

A look-up touches no file: it asks the `Catalog`, which a thread refreshes. What is found is read by `pread` and verified
in the caller's buffer. Nothing of another user's is ever written or deleted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from hpckv.log import warn_once
from hpckv.store.block import BlockGeometry, Box
from hpckv.store.boxes import covered
from hpckv.store.catalog import Catalog
from hpckv.store.collect import Collector
from hpckv.store.direct_io import BufferPool
from hpckv.store.durable import publish
from hpckv.store.fetch import within
from hpckv.store.foreign_file import UnusableFileError, is_gone
from hpckv.store.node_folder import Budget
from hpckv.store.root import StoreRoot
from hpckv.store.segment import Segment, SegmentContext, StoredBlock
from hpckv.store.segment_writer import SegmentWriter
from hpckv.store.survey import HEAT_EVERY_S, heat_record
from hpckv.store.throttle import RateLimit
from hpckv.store.tier import PutOutcome, Tier, TierStats

_log = logging.getLogger(__name__)

_OPEN_FILES = max(16, min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 16))
"""Segments held open, of up to two descriptors each, by each of up to four tiers: half of what a process may open."""


class FileTier(Tier):
    """Segments of one namespace; `own` is the folder this user writes to, None for reading only."""

    survives_process = True

    def __init__(
        self,
        catalog: Catalog,
        context: SegmentContext,
        own: Path | None,
        *,
        name: str = "shared",
        segment_bytes: int = 128 * 1024**2,
        seal_s: float = 60.0,
        refresh_s: float = 5.0,
        keep_s: int = 0,
        gid: int | None = None,
        budget: Budget | None = None,
        is_durable: bool = True,
        keeps_copies_only: bool = False,
        patience_s: float = 60.0,
        root: StoreRoot | None = None,
        write_limit: RateLimit | None = None,
        buffers: BufferPool | None = None,
        owned: BlockGeometry | None = None,
    ) -> None:
        """Reads the catalogue once; raises nothing, what cannot be read is passed over.

        Of a block that is put only the part in `owned`, KV heads of the same layers, is written: the rest is other ranks'.
        Own segments go, oldest first, where a new one would be beyond the `budget`. With the store's `root`, its quota is kept,
        uses are logged, and at the end own segments are indexed and collected. A filesystem that does not answer holds up
        the first look, a flush and the end for `patience_s` seconds each; the first look then goes on meanwhile.
        """
        self.name, self.keeps_copies_only, self._budget = name, keeps_copies_only, budget
        self.geometry = context.geometry
        self.stats = TierStats()
        self._buffers = buffers or BufferPool(self.geometry.block_bytes)
        self.catalog = catalog
        self._own, self._context = own, context
        self._files: OrderedDict[Path, Segment] = OrderedDict()
        self._pins: Counter[Path] = Counter()
        self._lock = threading.Lock()
        self._collector = root and Collector(root, is_pinned=self._is_pinned, on_deleted=self._forget)
        self._reads: Counter[Path] = Counter()
        self._keep_s, self._unlogged_keeps = keep_s, dict[Path, int]()
        self._heat_folder = root and own and root.layout.heat(os.getuid())
        self._next_heat = time.monotonic() + HEAT_EVERY_S
        self._root, self._patience_s = root, patience_s
        self._write_limit = write_limit
        self._owned = owned or context.geometry
        self._writer = own and SegmentWriter(
            own,
            replace(context, geometry=self._owned),
            self._on_sealed,
            segment_bytes=segment_bytes,
            seal_s=seal_s,
            keep_s=keep_s,
            gid=gid,
            is_durable=is_durable,
            make_room=self._make_room,
            patience_s=patience_s,
            slowest=write_limit.bytes_per_s / 2 if write_limit else None,
        )
        self._try(catalog.refresh)
        self._refresh_s = refresh_s
        self._is_closing = threading.Event()
        self._refresher = threading.Thread(target=self._refresh_loop, name=f"hpckv-refresh-{name}", daemon=True)
        self._refresher.start()

    def __len__(self) -> int:
        return len(self.catalog) + (self._writer.num_pending if self._writer else 0)

    def present(self, keys: Sequence[bytes]) -> np.ndarray:
        found = self.catalog.present(keys)
        if self._writer and self._writer.num_pending and self._writes_whole:
            for n in np.flatnonzero(~found).tolist():
                found[n] = self._writer.find(keys[n]) is not None
        return found

    def writer(self, key: bytes) -> int | None:
        if self.keeps_copies_only:
            return None
        if self._writer and self._writer.find(key) is not None:
            return os.getuid()
        places = self.catalog.places(key)
        return min(self.catalog.trusted_owner(places[0][0])) if places else None

    @property
    def _writes_whole(self) -> bool:
        """Whether what it writes is all that it reads: a block on its way can then be served."""
        return self._owned.box == self.geometry.box

    def get(self, key: bytes) -> memoryview | None:
        start = time.perf_counter()
        block = self._writer.find(key) if self._writer and self._writes_whole else None
        if block is not None:
            into = memoryview(block.payload).cast("B")
        else:
            into = self._buffers.take()
            cause, _ = self._read(key, into)
            if cause:
                self.stats.count_miss(cause)
                return None
        self.stats.count_hit(self.geometry.block_bytes, time.perf_counter() - start)
        return into

    def read_signed(self, key: bytes) -> tuple[memoryview, frozenset[int]] | None:
        """A published block and the uids of those who wrote it; None if it is not there. Not counted."""
        into = self._buffers.take()
        cause, paths = self._read(key, into)
        return None if cause else (into, frozenset().union(*map(self.catalog.trusted_owner, paths)))

    def _read(self, key: bytes, into: memoryview) -> tuple[str, list[Path]]:
        """Fill the buffer from one segment or several: empty, or why not, and the segments."""
        used: list[Path] = []
        filled: dict[Box, np.ndarray] = {}
        causes = []
        for path, row in self.catalog.places(key):
            # One more try with a fresh descriptor: the first may be stale.
            for is_last in (False, True):
                try:
                    segment = self._segment(path)
                    if segment.key(row) != key:
                        causes.append("absent")  # another key of the same prefix
                    else:
                        filled[segment.read(row, into, self.geometry)] = np.ones(1, dtype=bool)
                        with self._lock:
                            self._reads[path] += 1
                        used.append(path)
                        causes.append("partial")
                    break
                except (UnusableFileError, OSError, IndexError) as error:
                    self._forget_file(path)
                    if is_last or isinstance(error, FileNotFoundError):
                        causes.append(self._explain(path, error))
                        break
            if filled and covered(self.geometry.box, filled, 1)[0]:
                return "", used
        return (causes[-1] if causes else "absent"), used

    def _explain(self, path: Path, error: Exception) -> str:
        """Give the segment up; what its trouble is counted as."""
        self.catalog.forget(path, for_good=not isinstance(error, OSError))
        if is_gone(error):
            return "gone"
        reason = error.strerror if isinstance(error, OSError) else error
        warn_once(_log, f"{path.name}: {reason}; its blocks are computed again")
        return "io" if isinstance(error, OSError) else "damaged"

    def put(self, block: StoredBlock, *, keeps_payload: bool = False) -> PutOutcome:
        payload = block.payload if keeps_payload else bytes(block.payload)
        assert len(payload) == self.geometry.block_bytes
        if self.present([block.key])[0] or (self._writer and self._writer.find(block.key)):
            return PutOutcome.DUPLICATE
        if not self._writes_whole:
            payload = memoryview(payload).cast("B")[self.geometry.heads_span(self._owned)]
        if not self._writer or not self._writer.put(StoredBlock(block.key, block.parent, block.position, payload)):
            self.stats.dropped += 1
            return PutOutcome.DROPPED
        self.stats.stored += 1
        return PutOutcome.STORED

    def _on_sealed(self, path: Path, keys: np.ndarray, num_bytes: int) -> None:
        self.catalog.add(path, keys, self.geometry.box)
        self.stats.written_bytes += num_bytes
        if self._keep_s:
            self._unlogged_keeps[path] = self._keep_s

    def _make_room(self, num_bytes: int) -> bool:
        """Whether a file of that size may be written; waits for its turn where the rate is limited."""
        if self._collector and not self._collector.make_room(num_bytes):
            return False
        if self._budget and not self._keep_budget(self._budget, num_bytes):
            return False
        return self._write_limit is None or self._write_limit.take(num_bytes)

    def _keep_budget(self, budget: Budget, num_bytes: int) -> bool:
        if (excess := budget.excess(num_bytes)) > 0:
            self.evict(excess)
            excess = budget.excess(num_bytes)
        if excess > 0:
            warn_once(_log, f"{budget.folder}: no room for more copies; blocks are read from where they lie")
        return excess <= 0

    def flush(self) -> None:
        if self._writer:
            self._writer.flush()

    def pin(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            self._pins.update(path for key in keys for path, _ in self.catalog.places(key)[:1])

    def unpin(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            self._pins.subtract(path for key in keys for path, _ in self.catalog.places(key)[:1])
            self._pins = +self._pins

    def evict(self, num_bytes: int) -> int:
        """Delete own unpinned segments, oldest first; others' files are theirs."""
        freed = 0
        own = sorted((p for p in self.catalog.segments if p.parent == self._own), key=_mtime)
        for path in own:
            if freed >= num_bytes:
                break
            with self._lock:
                if self._pins[path]:
                    continue
            self._forget(path)
            size = _size(path)
            try:
                path.unlink()
            except OSError:
                continue  # somebody else's collector was faster
            freed += size
        return freed

    def take_back(self) -> None:
        """Drop what is not written yet, delete what this process wrote; of copies, also what others left here."""
        published = self._writer.discard() if self._writer else []
        for path in published:
            self._forget(path)
        self._try(partial(self._delete, published))

    def _delete(self, published: Sequence[Path]) -> None:
        if self.keeps_copies_only:
            self.evict(1 << 62)
        for path in published:
            with contextlib.suppress(OSError):
                path.unlink()

    def close(self) -> None:
        if self._is_closing.is_set():
            return
        self._is_closing.set()
        if self._writer:
            self._writer.close()
            if self._writer.is_writing:
                for work in self._tidying():
                    if not self._try(work):
                        break
        self.catalog.close()
        self._try(self._close_files)

    def _tidying(self) -> Iterator[Callable[[], object]]:
        """What is left to do at the end, the quickest first."""
        yield self._log_heat
        if self._collector and self._root:
            yield partial(self.catalog.consolidate, os.getuid(), gid=self._root.policy.group)
            yield self._collector.collect

    def _close_files(self) -> None:
        with self._lock:
            self._files.clear()

    def _try(self, work: Callable[[], object]) -> bool:
        """Do what must not hurt the run; whether it was done. A dead filesystem holds it up for a while only."""
        try:
            within(self._patience_s, work)
        except Exception as error:  # noqa: BLE001 - as the refresher: trouble with a store is only said
            reason = error.strerror if isinstance(error, OSError) else error
            warn_once(_log, f"store {self.catalog.layout.root}: {reason}; going on without it")
            return False
        return True

    def _is_pinned(self, path: Path) -> bool:
        with self._lock:
            return bool(self._pins[path]) or path in self._unlogged_keeps

    def _forget(self, path: Path) -> None:
        self.catalog.forget(path)
        self._forget_file(path)

    def _log_heat(self) -> None:
        """Tell collectors what was read since the last time."""
        with self._lock:
            reads, self._reads = self._reads, Counter()
            keeps, self._unlogged_keeps = self._unlogged_keeps, {}
        if (reads or keeps) and self._heat_folder and self._root:
            self._root.make_own_folder(self._heat_folder)
            users = self._root.layout.users
            named = [{str(path.relative_to(users)): n for path, n in counts.items()} for counts in (reads, keeps)]
            record = heat_record(named[0], time.time(), named[1])
            try:
                publish(self._heat_folder / f"{secrets.token_hex(16)}.json", [record], gid=self._root.policy.group)
            except OSError:
                with self._lock:  # for the next time
                    self._reads.update(reads)
                    self._unlogged_keeps.update(keeps)
                raise

    def _refresh_loop(self) -> None:
        # Never joined: it may hang in a dead filesystem's system call.
        while not self._is_closing.wait(self._refresh_s):
            try:
                self.catalog.refresh()
                if time.monotonic() > self._next_heat:
                    self._next_heat = time.monotonic() + HEAT_EVERY_S
                    self._log_heat()
            except Exception as error:  # noqa: BLE001 - a store in trouble is a store without news
                warn_once(_log, f"store {self.catalog.layout.root}: {error}; its news are not seen")

    def _segment(self, path: Path) -> Segment:
        with self._lock:
            if path in self._files:
                self._files.move_to_end(path)
                return self._files[path]
        segment = Segment(path, self._context, self.catalog.trusted_owner(path))
        with self._lock:
            self._files[path] = segment
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return segment

    def _forget_file(self, path: Path) -> None:
        # Whoever still reads from it keeps it open; its descriptor goes with the last reference.
        with self._lock:
            self._files.pop(path, None)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
