"""One process of a node looks at the shared filesystem; the others of the same user read from the node's disk what it saw.

The leader holds a lock on a file of the node's own disk (the kernel gives it back when the process dies) and leaves its view
of the store as one file. Followers map that file: ten million blocks are in memory once, not once a process. What it says is
a hint where to look, as any index.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpckv.store.block import Box
from hpckv.store.block_index import Entries
from hpckv.store.durable import publish
from hpckv.store.foreign_file import UnusableFileError, open_trusted

_MAGIC = b"HPCKVNOD"
_HEAD = struct.Struct("<8sII")
_VERSION = 1
_BUSY_SHARE = 20
"""A leader spends at most one part in so many on leaving its view."""


@dataclass(frozen=True)
class View:
    """Segments by number, as (path below the users' folders, box), and the entries of each box."""

    segments: Mapping[int, tuple[str, Box]]
    entries: Mapping[Box, Entries]


class NodeIndex:
    """This user's view of one namespace on this node."""

    def __init__(self, folder: Path) -> None:
        """`folder` is on the node's own disk and this user's alone; made if missing. Raises `OSError`."""
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        self._view = folder / "view"
        self._lock_fd = os.open(folder / "leader", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._is_leading = False
        self._seen: tuple[int, int] | None = None
        self._not_before = 0.0

    def leads(self) -> bool:
        """Whether it is this process that looks; becomes so when nobody else is."""
        if not self._is_leading:
            with suppress(OSError):
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._is_leading = True
        return self._is_leading

    @property
    def may_leave(self) -> bool:
        """Whether leaving a view now keeps to the leader's share of time."""
        return time.monotonic() >= self._not_before

    def leave(self, view: View) -> None:
        """Let the others see what this leader knows; raises `OSError`."""
        start = time.monotonic()
        head = json.dumps(
            {
                "segments": [[number, name, box] for number, (name, box) in view.segments.items()],
                "entries": [[box, len(entries)] for box, entries in view.entries.items()],
            }
        ).encode()
        head += b" " * (-(_HEAD.size + len(head)) % 8)
        parts: list[bytes | memoryview] = [_HEAD.pack(_MAGIC, _VERSION, len(head)), head]
        for entries in view.entries.values():
            parts += [np.ascontiguousarray(a, "<u8").data.cast("B") for a in (entries.prefixes, entries.places)]
        publish(self._view, parts, mode=0o400, is_durable=False)
        self._not_before = time.monotonic() + _BUSY_SHARE * (time.monotonic() - start)

    def news(self, *, again: bool = False) -> View | None:
        """The leader's view if it is another than the last time, or `again`; raises `UnusableFileError` or `OSError`."""
        status = self._view.stat()
        if (status.st_ino, status.st_mtime_ns) == self._seen and not again:
            return None
        fd, status = open_trusted(self._view, frozenset({os.getuid()}))
        try:
            # Its own user's, on the node's disk, replaced and never truncated: mapping is safe here.
            data = memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
        except ValueError:
            raise UnusableFileError("empty") from None
        finally:
            os.close(fd)
        view = _parse(data)
        self._seen = status.st_ino, status.st_mtime_ns
        return view

    def close(self) -> None:
        """Let somebody else lead; idempotent."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd, self._is_leading = -1, False


def _parse(data: memoryview) -> View:
    try:
        magic, version, length = _HEAD.unpack_from(data)
        if (magic, version) != (_MAGIC, _VERSION):
            raise UnusableFileError("no view of this version")
        at = _HEAD.size + length
        head = json.loads(bytes(data[_HEAD.size : at]))
        segments = {int(number): (str(name), _box(box)) for number, name, box in head["segments"]}
        entries = {}
        for box, count in head["entries"]:
            columns = []
            for _ in range(2):
                columns.append(np.frombuffer(data, "<u8", count, at))
                at += 8 * count
            entries[_box(box)] = Entries(*columns)
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise UnusableFileError(f"damaged ({error})") from None
    if any(not segments.keys() >= set(e.counts()[0].tolist()) for e in entries.values()):
        raise UnusableFileError("damaged (its entries name segments that it does not list)")
    return View(segments, entries)


def _box(numbers: Sequence[int]) -> Box:
    h0, h1, l0, l1 = map(int, numbers)
    return h0, h1, l0, l1
