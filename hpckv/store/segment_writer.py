"""Write-behind: blocks are collected in memory, sealed into segments by threads, and published by `durable.publish`.

`put()` never waits for a device: while two segments wait to be written, it drops.
"""

from __future__ import annotations

import errno
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hpckv.store.durable import publish
from hpckv.store.segment import SegmentContext, StoredBlock, build_segment

_log = logging.getLogger(__name__)

_SLOWEST = 8 * 1024**2
"""Bytes a second; a device is given up that takes a flush more slowly."""
_SEALING_AT_ONCE = 2
"""Threads, and segments that wait for them: one digests while the other writes."""

OnSealed = Callable[[Path, np.ndarray, int], None]
"""Called with a published segment's path, its (n, 32) keys and its size in bytes."""


class SegmentWriter:
    """The open segment of one process, and the threads that seal it when it is full or old."""

    def __init__(
        self,
        folder: Path,
        context: SegmentContext,
        on_sealed: OnSealed,
        *,
        segment_bytes: int,
        seal_s: float,
        keep_s: int = 0,
        gid: int | None = None,
        is_durable: bool = True,
        make_room: Callable[[int], bool] = lambda num_bytes: True,
        patience_s: float = 120.0,
        slowest: float | None = None,
    ) -> None:
        """`make_room` is asked before each file is written, with its size; without room the blocks are dropped.

        A device that has not taken a flush after `patience_s` seconds, and those that its bytes may take at `slowest` bytes
        a second, is given up.
        """
        self.num_lost = 0
        """Blocks that were taken and could not be written."""
        self._folder, self._context, self._on_sealed = folder, context, on_sealed
        self._segment_bytes, self._seal_s, self._keep_s = segment_bytes, seal_s, keep_s
        self._gid, self._is_durable, self._make_room = gid, is_durable, make_room
        self._is_writing, self._is_hanging, self._patience_s = True, False, patience_s
        self._slowest = min(_SLOWEST, slowest or _SLOWEST)
        self._lock = threading.Lock()
        self._open: dict[bytes, StoredBlock] = {}
        self._opened_at = 0.0
        self._sealing: list[dict[bytes, StoredBlock]] = []
        self._published: list[Path] = []
        self._work: queue.Queue[dict[bytes, StoredBlock] | None] = queue.Queue()
        self._threads: list[threading.Thread] = []

    @property
    def num_pending(self) -> int:
        """Blocks that are in no published segment yet."""
        return sum(map(len, (self._open, *self._sealing)))

    def put(self, block: StoredBlock) -> bool:
        """Take the block, whose payload must not change any more; False if it was dropped."""
        with self._lock:
            if not self._is_writing or len(self._sealing) >= _SEALING_AT_ONCE:
                return False
            if not self._open:
                self._opened_at = time.monotonic()
                self._start()
            self._open[block.key] = block
            if len(self._open) * self._context.geometry.block_bytes >= self._segment_bytes:
                self._seal_open()
        return True

    def find(self, key: bytes) -> StoredBlock | None:
        """A block that is still in memory."""
        with self._lock:
            for blocks in (self._open, *self._sealing):
                if key in blocks:
                    return blocks[key]
        return None

    def discard(self) -> list[Path]:
        """Forget every block that is in no published segment yet; returns the segments that were published."""
        with self._lock:
            for blocks in (self._open, *self._sealing):
                self.num_lost += len(blocks)
                blocks.clear()
            published, self._published = self._published, []
        return published

    def flush(self) -> None:
        """Seal and publish everything; on return it is in the folder or counted in `num_lost`."""
        with self._lock:
            if self._open:
                self._seal_open()
        if self._is_hanging:
            return
        limit_s = self._patience_s + self.num_pending * self._context.geometry.block_bytes / self._slowest
        with self._work.all_tasks_done:
            self._is_hanging = not self._work.all_tasks_done.wait_for(lambda: not self._work.unfinished_tasks, limit_s)
        if self._is_hanging:
            self._give_up(self.num_pending, TimeoutError(errno.ETIMEDOUT, f"nothing was written in {limit_s:.1f} s"))

    def close(self) -> None:
        """flush(), then end the threads, unless they hang; idempotent."""
        self.flush()
        for _ in self._threads:
            self._work.put(None)
        if not self._is_hanging:
            for thread in self._threads:
                thread.join()
        self._threads = []

    @property
    def is_writing(self) -> bool:
        """False once the device failed or was given up."""
        return self._is_writing

    def _start(self) -> None:
        while len(self._threads) < _SEALING_AT_ONCE:
            self._threads.append(threading.Thread(target=self._loop, name="hpckv-seal", daemon=True))
            self._threads[-1].start()

    def _seal_open(self) -> None:
        self._sealing.append(self._open)
        self._work.put(self._open)
        self._open = {}

    def _loop(self) -> None:
        while True:
            try:
                blocks = self._work.get(timeout=min(1.0, max(0.02, self._seal_s)))
            except queue.Empty:
                with self._lock:
                    if self._open and time.monotonic() - self._opened_at > self._seal_s:
                        self._seal_open()
                continue
            if blocks is None:
                self._work.task_done()
                return
            try:
                self._seal(blocks)
            except Exception as error:  # noqa: BLE001 - any failure here only costs a later recomputation
                self._give_up(len(blocks), error)
            finally:
                with self._lock:
                    self._sealing.remove(blocks)
                self._work.task_done()

    def _seal(self, collected: dict[bytes, StoredBlock]) -> None:
        """Publish them, unless they are discarded meanwhile."""
        with self._lock:
            blocks = list(collected.values())
        if not blocks:
            return
        path = self._folder / f"{secrets.token_hex(16)}.h5"
        parts = build_segment(self._context, blocks, keep_s=self._keep_s)
        if not self._make_room(sum(map(len, parts))):
            self.num_lost += len(blocks)
            return
        publish(path, parts, gid=self._gid, is_durable=self._is_durable, is_direct=self._is_durable)
        with self._lock:
            if collected:
                self._published.append(path)
        if not collected:
            path.unlink(missing_ok=True)
            return
        keys = np.frombuffer(b"".join(b.key for b in blocks), np.uint8).reshape(len(blocks), -1)
        self._on_sealed(path, keys, sum(map(len, parts)))

    def _give_up(self, num_lost: int, error: Exception) -> None:
        with self._lock:
            is_first, self._is_writing = self._is_writing, False
            self.num_lost += num_lost
        if not is_first:
            return  # it was said when another segment failed
        reason = error.strerror if isinstance(error, OSError) else error
        _log.warning("store %s: %s; nothing more is written to it in this run", self._folder, reason)
