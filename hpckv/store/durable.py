"""The one way a file comes into view: complete, on the disk, under its final name - or not at all.

Only this module renames files into place.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

Buffer = bytes | bytearray | memoryview


def publish(path: Path, parts: Iterable[Buffer], *, mode: int = 0o440, replace: bool = True) -> None:
    """Write `parts` to a new file and bring it into view as `path`. On return it survives a power cut.

    With `replace` false an existing file is left as it is and `FileExistsError` raised, also when two processes
    try at once. Raises `OSError`; then `path` is as it was. A lost rename reply is recognised as success.
    """
    # A name of its own in the target directory: no two writers share it, and the rename stays in one directory.
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}-{os.uname().nodename}-{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            for part in parts:
                _write_all(fd, memoryview(part).cast("B"))
            os.fchmod(fd, mode)
            # Lustre and NFS report a full quota here, not at write(). A descriptor that failed is never retried.
            os.fsync(fd)
        finally:
            os.close(fd)
        written = os.stat(temporary)
        try:
            if replace:
                os.rename(temporary, path)
            else:
                os.link(temporary, path)  # unlike rename, never replaces
                os.unlink(temporary)
        except OSError:
            # The server may have renamed and its reply got lost: what counts is what stands there now.
            if not _is_same_file(path, written):
                raise
    except BaseException:
        # A crash before this line leaves an orphan that starts with `.tmp-`; nobody reads those.
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    # The name itself is on the disk only when its directory is.
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """fsync a directory; raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _is_same_file(path: Path, written: os.stat_result) -> bool:
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (written.st_dev, written.st_ino)
