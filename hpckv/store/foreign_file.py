"""Opening files that somebody else may have written: nothing is followed, nothing blocks, owner and mode are checked."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from hpckv.store.ownership import is_of_user


class UnusableFileError(Exception):
    """A file in the store cannot be used: torn, foreign, damaged or unsafe. For a reader it is a miss."""


def is_gone(error: Exception) -> bool:
    """Whether it only says that the file was deleted: by somebody on this node, or on another (ESTALE)."""
    return isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ESTALE)


def open_trusted(path: Path, trusted_uids: frozenset[int] | None) -> tuple[int, os.stat_result]:
    """A descriptor for reading and its status; raises `UnusableFileError` or `OSError`. None trusts every owner.

    The file must be a regular one that nobody but its owner can write.
    """
    # O_NONBLOCK: somebody's fifo must not stop us; O_NOFOLLOW: nor a link lead us out of the store.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UnusableFileError("not a regular file")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UnusableFileError("writable by others than its owner")
        if trusted_uids is not None and not any(is_of_user(status, uid) for uid in trusted_uids):
            raise UnusableFileError(f"owned by uid {status.st_uid}, who is not trusted")
    except BaseException:
        os.close(fd)
        raise
    return fd, status


def read_into(fd: int, into: memoryview, offset: int) -> None:
    """Fill the whole buffer; raises `UnusableFileError` at the end of the file, or `OSError`."""
    done = 0
    while done < len(into):
        got = os.preadv(fd, [into[done:]], offset + done)
        if got == 0:
            raise UnusableFileError("ends too early")
        done += got
