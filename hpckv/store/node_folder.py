"""Folders of copies on this node's own disk: how much they may take, who uses them, and what becomes of them when nobody does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

UNUSED_S = 7 * 86400.0
"""What nobody has used for so long is left over."""
_SPARE = 0.05
"""Of the disk, that copies leave free."""
_GONE = ".gone"


def room_in(folder: Path) -> int:
    """Bytes that copies may still take of the disk that `folder` is on; below 0 where others took what they leave free."""
    usage = shutil.disk_usage(folder)
    return usage.free - int(_SPARE * usage.total)


@dataclass(frozen=True)
class Budget:
    """What the copies in `folder` may take: no more than `most`, and no more than there is room for."""

    folder: Path
    most: int

    def excess(self, num_bytes: int) -> int:
        """How many bytes there must go before so many more may come, also for what other processes left; raises `OSError`."""
        taken = 0
        for path in self.folder.iterdir():
            try:
                taken += path.stat().st_size
            except FileNotFoundError:
                continue  # another process evicts as well
        return num_bytes + max(taken - self.most, -room_in(self.folder))


@contextlib.contextmanager
def hold(folder: Path, kind: int) -> Iterator[None]:
    """Keep `folder`, which need not be there yet, from being removed: `fcntl.LOCK_SH` with others, `LOCK_EX` alone on this node.

    The lock is a file beside it. This disk's locks can be trusted, and the kernel gives a dead process's back. Raises `OSError`;
    with `LOCK_NB`, `BlockingIOError` if another process holds it.
    """
    lock = _lock(folder)
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, kind)
            if _is_at(fd, lock):
                os.utime(fd)
                yield
                with contextlib.suppress(OSError):
                    os.utime(fd)  # a long run has used it until now
                return
        finally:
            os.close(fd)
        # Whoever removed the folder, and the lock with it, was faster.


def last_hold(folder: Path) -> float:
    """When somebody began or ceased to hold it, seconds since 1970; as far as is known."""
    try:
        return (_lock(folder) if _lock(folder).exists() else folder).stat().st_mtime
    except OSError:
        return time.time()  # gone meanwhile


def sweep(
    base: Path, last_use: Callable[[Path], float] = last_hold, is_roomy: Callable[[], bool] = lambda: True
) -> None:
    """Remove the folders in `base` that nobody holds and nobody has used for a week; without room also others, the oldest first.

    A process that reads what it does not hold goes on: its files are open. Raises `OSError` if `base` cannot be listed.
    """
    folders = [folder for folder in base.iterdir() if folder.is_dir() and not folder.is_symlink()]
    for used, folder in sorted((last_use(folder), folder) for folder in folders):
        if folder.suffix == _GONE:
            shutil.rmtree(folder, ignore_errors=True)  # whoever removed it was interrupted
        elif time.time() - used > UNUSED_S or not is_roomy():
            remove(folder)


def remove(folder: Path) -> None:
    """With its lock, unless somebody holds it."""
    gone = folder.with_name(f"{secrets.token_hex(8)}{_GONE}")
    try:
        with hold(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
            try:
                folder.rename(gone)  # nobody finds half of it
            finally:
                _lock(folder).unlink()
    except OSError:
        return  # it is in use, or another process was faster
    shutil.rmtree(gone, ignore_errors=True)


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False
