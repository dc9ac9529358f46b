"""Reading past the page cache where that is faster, into page-aligned buffers that are used again and again.

A block that the page cache has is copied from there; any other comes straight from the device into the buffer that will be used,
without the copy and the cache's bookkeeping. Where the filesystem or the alignment does not allow it, reads are ordinary ones.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable

import numpy as np

from hpckv.store.foreign_file import read_into

ALIGNMENT = 4096
Undo = Callable[[], object]
_MOST_IDLE = 128
"""Buffers kept, however small they are: each is a mapping of its own."""


def open_direct(fd: int, mode: int = os.O_RDONLY) -> int:
    """Another descriptor of an open file that bypasses the page cache; -1 where there is no such thing."""
    try:
        # By descriptor, not by name: a name may mean another file by now.
        direct_fd = os.open(f"/proc/self/fd/{fd}", mode | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return -1
    if mode != os.O_RDONLY:
        return direct_fd
    # Asking the cache for a page would else make it read ahead what is then read directly.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return direct_fd


def read_past_cache(fd: int, direct_fd: int, into: memoryview, offset: int) -> None:
    """Fill the whole buffer from two descriptors of one file; raises as `read_into` does."""
    done = 0
    if direct_fd >= 0 and is_aligned(into, offset) and not _is_cached(fd, into, offset):
        try:
            while done < len(into) and not done % ALIGNMENT:
                got = os.preadv(direct_fd, [into[done:]], offset + done)
                if got == 0:
                    break
                done += got
        except OSError:
            pass  # an ordinary read says what is wrong, or succeeds
    if done < len(into):
        read_into(fd, into[done:], offset + done)


def _is_cached(fd: int, into: memoryview, offset: int) -> bool:
    """Whether the first page is in the page cache, by trying to read it from there and nowhere else."""
    try:
        return os.preadv(fd, [into[:ALIGNMENT]], offset, os.RWF_NOWAIT) == ALIGNMENT
    except OSError:  # not there, or not supported
        return False


def is_aligned(buffer: memoryview, offset: int) -> bool:
    """Whether a device can read into it, or write it, at that place of a file."""
    address = int(np.frombuffer(buffer, np.uint8).ctypes.data)
    return not (len(buffer) % ALIGNMENT or offset % ALIGNMENT or address % ALIGNMENT)


def aligned_buffer(num_bytes: int) -> memoryview:
    """New memory at the beginning of a page."""
    return memoryview(mmap.mmap(-1, num_bytes))


class BufferPool:
    """Page-aligned buffers of one size. A buffer is used again once nobody refers to it or a part of it any more.

    The first touch of memory can cost more than what is read into it (`bench/store.py` shows it), so buffers are kept, and
    some can be reserved while there is time.
    """

    def __init__(
        self,
        num_bytes: int,
        *,
        max_idle_bytes: int = 1024**3,
        on_new: Callable[[int, int], Undo | None] | None = None,
    ) -> None:
        """At most `max_idle_bytes` of unused buffers are kept.

        `on_new(address, num_bytes)` hears of new memory, to pin it, say; what it returns is called before that memory is given back
        to the kernel, which may soon have something else at the same address.
        """
        self.num_bytes = num_bytes
        self.on_new = on_new
        self._max_idle = min(_MOST_IDLE, max(1, max_idle_bytes // num_bytes))
        self._idle: list[np.ndarray] = []
        self._lock = threading.Lock()

    def reserve(self) -> None:
        """Make and touch as many buffers as are kept idle."""
        while len(self._idle) < self._max_idle:
            memory = self._new()
            memory[::ALIGNMENT] = 0
            self.give_back(memory)

    def take(self) -> memoryview:
        """A buffer with anything in it."""
        with self._lock:
            memory = self._idle.pop() if self._idle else None
        return memoryview(np.asarray(_Lease(self, self._new() if memory is None else memory)).data)

    def _new(self) -> np.ndarray:
        memory = np.frombuffer(aligned_buffer(self.num_bytes), np.uint8)
        if self.on_new and (undo := self.on_new(memory.ctypes.data, self.num_bytes)):
            weakref.finalize(memory, undo).atexit = False  # a process that ends has nothing to undo
        return memory

    def give_back(self, memory: np.ndarray) -> None:
        # Runs in whichever thread lets the last reference go, also within take(): no lock, appending is atomic.
        # Telling somebody of new memory, as on_new does, costs more than keeping it.
        if self.on_new or len(self._idle) < self._max_idle:
            self._idle.append(memory)


class _Lease:
    """What the views of a lent buffer refer to; its end is the end of the last of them."""

    def __init__(self, pool: BufferPool, memory: np.ndarray) -> None:
        self._pool, self._memory = pool, memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._pool.give_back(self._memory)
