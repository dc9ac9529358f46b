"""The output file is the checkpoint: complete lines, appended as answers finish. What is left is input minus output.

A killed writer can leave at most a torn last line, a lost node also a hole of zeros; both are cut out at the next
start, and the requests they belonged to are computed again. Every start puts a file of its own in the place of the one before, with
the same lines: an earlier start that is still there - on a node that lost its network, say - writes to a file that has no name any
more, and ends when it notices. No lock is needed for that.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from hpckv.errors import CannotWriteError
from hpckv.store.durable import mode_for, publish

_log = logging.getLogger(__name__)

_SYNC_S = 5.0


class OutputFile:
    """`output.jsonl` of one run, open for appending; `done` are the ids it has a complete line for."""

    def __init__(self, path: Path) -> None:
        """Take over what is there, without what is torn or repeated; raises `CannotWriteError`."""
        self.path = path
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        try:
            self.done: set[str] = set()
            try:
                self._fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                self.done, own = self._take_over()
                self._fd = os.open(path, flags)
                if os.fstat(self._fd).st_ino != own.st_ino:  # two starts at the same moment
                    raise self._lost() from None
        except OSError as error:
            raise CannotWriteError(f"{path}: {error.strerror}") from None
        self._synced = time.monotonic()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line, whole or not at all; raises `CannotWriteError` when the disk is full."""
        data = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        status = os.fstat(self._fd)
        if not status.st_nlink:
            raise self._lost()
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            if time.monotonic() - self._synced > _SYNC_S:
                self.sync()
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, status.st_size)  # no torn line stays behind
            raise CannotWriteError(
                f"{self.path}: {error.strerror}; all answers so far are safe, run again to go on"
            ) from None
        self.done.add(str(record["custom_id"]))

    def sync(self) -> None:
        """Bring every line so far onto the disk; raises `CannotWriteError`, also if another start has taken over."""
        try:
            os.fsync(self._fd)  # network filesystems say only here that a quota is used up
            self._synced = time.monotonic()
            is_own = os.stat(self.path).st_ino == os.fstat(self._fd).st_ino  # they may not count names rightly, either
        except OSError as error:
            raise CannotWriteError(
                f"{self.path}: {error.strerror}; run again to make sure of the last answers"
            ) from None
        if not is_own:
            raise self._lost()

    def _lost(self) -> CannotWriteError:
        return CannotWriteError(f"{self.path}: another start of this run has taken over; this one ends")

    def close(self) -> None:
        """Sync and close; raises `CannotWriteError` if the filesystem reports a full disk only now, or another start took over."""
        try:
            self.sync()
        finally:
            os.close(self._fd)

    def _take_over(self) -> tuple[set[str], os.stat_result]:
        """Put a copy of the complete lines in the file's place; their ids, and which file it is."""
        done, num_bad, own = gather_lines([self.path], self.path)
        if num_bad:
            _log.warning("%s: %d torn or repeated lines are cut out; their requests run again", self.path, num_bad)
        return done, own


def gather_lines(sources: Sequence[Path], target: Path) -> tuple[set[str], int, os.stat_result]:
    """Put a file in the place of `target` with the complete lines of `sources`, one for each id: the first.

    Gives the ids, how many lines were torn or repeated, and which file it is. Raises `OSError`; `target` is then as it was.
    """
    done: set[str] = set()
    num_bad = 0
    with ExitStack() as stack:
        parts: list[memoryview] = []
        for source in sources:
            file = stack.enter_context(source.open("rb"))
            spans, bad = _complete_spans(file, done)
            num_bad += bad
            if spans:
                data = stack.enter_context(mmap.mmap(file.fileno(), spans[-1][1], access=mmap.ACCESS_READ))
                view = stack.enter_context(memoryview(data))
                parts += [stack.enter_context(view[start:end]) for start, end in spans]
        return done, num_bad, publish(target, parts, mode=mode_for(target))


def _complete_spans(lines: Iterable[bytes], done: set[str]) -> tuple[list[tuple[int, int]], int]:
    """Where the lines are that add an id to `done`, which they do, and how many others there are."""
    spans: list[tuple[int, int]] = []
    num_bad = position = 0
    for raw in lines:
        start, position = position, position + len(raw)
        custom_id = _complete_id(raw)
        if custom_id is None or custom_id in done:
            num_bad += 1
            continue
        done.add(custom_id)
        if spans and spans[-1][1] == start:
            spans[-1] = spans[-1][0], position
        else:
            spans.append((start, position))
    return spans, num_bad


def ids_in(path: Path) -> set[str]:
    """Ids of the complete lines; none if there is no such file."""
    done: set[str] = set()
    if path.exists():
        with path.open("rb") as file:
            _complete_spans(file, done)
    return done


def request_ids_in(path: Path) -> dict[str, str]:
    """`custom_id` -> `id` of the complete lines; none if there is no such file."""
    found: dict[str, str] = {}
    if path.exists():
        with path.open("rb") as file:
            for raw in file:
                if (custom_id := _complete_id(raw)) is not None:
                    found.setdefault(custom_id, str(json.loads(raw).get("id", "")))
    return found


def write_file(path: Path, text: str) -> None:
    """Put a whole file in place; raises `CannotWriteError`."""
    try:
        publish(path, [text.encode()], mode=mode_for(path))
    except OSError as error:
        raise CannotWriteError(f"{path}: {error.strerror}") from None


def _complete_id(raw: bytes) -> str | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        record = json.loads(raw)
        return str(record["custom_id"])
    except (ValueError, KeyError, TypeError):
        return None
