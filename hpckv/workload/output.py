"""The output file is the checkpoint: complete lines, appended as answers finish. What is left is input minus output.

A killed writer can leave at most a torn last line, a lost node also a hole of zeros; both are cut out at the next
start, and the requests they belonged to are computed again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpckv.errors import CannotWriteError
from hpckv.store.durable import publish

_log = logging.getLogger(__name__)

_SYNC_S = 5.0


class OutputFile:
    """`output.jsonl` of one run, open for appending; `done` are the ids it has a complete line for."""

    def __init__(self, path: Path) -> None:
        """Read what is there, mend its end; raises `CannotWriteError`."""
        self.path = path
        try:
            self.done = self._mend()
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CannotWriteError(f"{path}: {error.strerror}") from None
        self._synced = time.monotonic()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line, whole or not at all; raises `CannotWriteError` when the disk is full."""
        data = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        before = os.fstat(self._fd).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            if time.monotonic() - self._synced > _SYNC_S:
                self.sync()
        except OSError as error:
            os.ftruncate(self._fd, before)  # no torn line stays behind
            raise CannotWriteError(
                f"{self.path}: {error.strerror}; all answers so far are safe, run again to go on"
            ) from None
        self.done.add(str(record["custom_id"]))

    def sync(self) -> None:
        """Bring every line so far onto the disk; raises `OSError`."""
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close; raises `CannotWriteError` if the filesystem reports a full disk only now."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise CannotWriteError(
                f"{self.path}: {error.strerror}; run again to make sure of the last answers"
            ) from None
        finally:
            os.close(self._fd)

    def _mend(self) -> set[str]:
        if not self.path.exists():
            return set()
        good: list[bytes] = []
        done: set[str] = set()
        num_bad, good_bytes, is_tail_only = 0, 0, True
        with self.path.open("rb") as file:
            for raw in file:
                custom_id = _complete_id(raw)
                if custom_id is None or custom_id in done:
                    num_bad += 1
                    continue
                is_tail_only = is_tail_only and num_bad == 0
                done.add(custom_id)
                good.append(raw)
                good_bytes += len(raw)
        if num_bad:
            _log.warning("%s: %d torn or repeated lines are cut out; their requests run again", self.path, num_bad)
            if is_tail_only:
                os.truncate(self.path, good_bytes)
            else:
                publish(self.path, good, mode=0o644)
        return done


class RunLock:
    """Keeps a second process out of a run directory. Where the filesystem has no locks, it says so and lets pass."""

    def __init__(self, directory: Path) -> None:
        """Raises `CannotWriteError` if another process holds the directory."""
        path = directory / ".lock"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CannotWriteError(f"{path}: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise CannotWriteError(f"{directory}: another process is running there") from None
        except OSError as error:
            _log.warning(
                "%s: no file locks here (%s); start no second run in this directory", directory, error.strerror
            )

    def release(self) -> None:
        """Let others in."""
        os.close(self._fd)


def write_file(path: Path, text: str) -> None:
    """Put a whole file in place; raises `CannotWriteError`."""
    try:
        publish(path, [text.encode()], mode=0o644)
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
