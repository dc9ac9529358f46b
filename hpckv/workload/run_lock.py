"""One process at a time in a run directory, where the filesystem has locks; `output.py` says what holds without."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import threading
from contextlib import suppress
from pathlib import Path

import msgspec

from hpckv.errors import CannotWriteError
from hpckv.workload.starts import job_of_this_process

_log = logging.getLogger(__name__)


class Holder(msgspec.Struct):
    """Who has a directory, or had it last."""

    host: str = ""
    pid: int = 0
    job: str | None = None
    restart: int = 0

    @classmethod
    def this_process(cls) -> Holder:
        job, restart = job_of_this_process()
        return cls(platform.node(), os.getpid(), job, restart)

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}" if self.host else "another process"

    def is_earlier_start_of(self, other: Holder) -> bool:
        """Of the same job, before it was requeued: Slurm has given its node up."""
        return self.job is not None and self.job == other.job and self.restart < other.restart


class RunLock:
    """Keeps a second process out of a run directory. Where the filesystem has no locks, it says so and lets pass."""

    def __init__(self, directory: Path, kind: int = fcntl.LOCK_EX) -> None:
        """Raises `CannotWriteError` if another process holds the directory; those that `LOCK_SH` it hold it together.

        An earlier start of this very job that still holds it, on a node that Slurm has lost, is passed by: it will find that the
        output is no longer its own.
        """
        path, own = directory / ".lock", Holder.this_process()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise CannotWriteError(f"{path}: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            if not holder.is_earlier_start_of(own):
                os.close(self._fd)
                raise CannotWriteError(f"{directory}: {holder} is running there; wait for it, or end it") from None
            _log.warning("%s: %s is lost to Slurm and not dead; this start takes over", directory, holder)
            # It will end; from then on this start is the one that keeps others out.
            threading.Thread(target=fcntl.flock, args=(self._fd, kind), name="hpckv-lock", daemon=True).start()
        except OSError as error:
            _log.warning(
                "%s: no file locks here (%s); start no second run in this directory", directory, error.strerror
            )
        with suppress(OSError):  # a full filesystem: then nobody knows who it was
            content = msgspec.json.encode(own)
            os.pwrite(self._fd, content, 0)
            os.ftruncate(self._fd, len(content))

    def _holder(self) -> Holder:
        try:
            return msgspec.json.decode(os.pread(self._fd, 4096, 0), type=Holder)
        except (OSError, msgspec.DecodeError):
            return Holder()

    def release(self) -> None:
        """Let others in."""
        os.close(self._fd)
