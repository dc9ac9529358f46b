"""The one way a file comes into view: complete, on the disk, under its final name - or not at all.

Only this module renames files into place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from hpckv.store.ownership import is_of_group

_AT_ONCE = 512
"""Parts handed to one writev(); the kernel takes 1,024."""

Buffer = bytes | bytearray | memoryview


def mode_for(path: Path) -> int:
    """For a file of the user's own: the permission bits of the one that is there, else what the umask leaves."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return 0o666 & ~umask()


def umask() -> int:
    """Asked of the kernel: os.umask() would set it, for all threads."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1], 8) for line in lines if line.startswith("Umask:")), 0o022)


def publish(
    path: Path,
    parts: Sequence[Buffer],
    *,
    mode: int = 0o440,
    replace: bool = True,
    gid: int | None = None,
    is_durable: bool = True,
    is_direct: bool = False,
) -> os.stat_result:
    """Write `parts` to a new file and bring it into view as `path`. On return it survives a power cut; gives the new file's status
    before it was written, which tells it from any other.

    `gid` is the group the file must come to belong to: elsewhere it would count against another quota and be seen by
    others. With `is_direct` page-aligned parts bypass the page cache where the filesystem lets them. Not `is_durable`:
    complete before it is seen, but not synced; for copies whose loss costs nothing. With `replace` false an existing file is
    left as it is and `FileExistsError` raised, also when two processes try at once.
    Raises `OSError`; then `path` is as it was. A lost rename reply is recognised as success.
    """
    # A name of its own in the target directory: no two writers share it, and the rename stays in one directory.
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}-{os.uname().nodename}-{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            written = os.fstat(fd)
            if gid is not None and not is_of_group(written, gid):
                raise PermissionError(errno.EPERM, f"its files get group {written.st_gid}, not the project's {gid}")
            if is_direct:
                _write_direct(fd, parts)
            else:
                _write_all(fd, parts)
            os.fchmod(fd, mode)
            if is_durable:
                # Lustre and NFS report a full quota here, not at write(). A descriptor that failed is never retried.
                os.fsync(fd)
        finally:
            os.close(fd)
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
    if is_durable:
        # The name itself is on the disk only when its directory is.
        sync_directory(path.parent)
    return written


def sync_directory(path: Path) -> None:
    """fsync a directory; raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        # xfs that went down before it wrote its log answers a folder's fsync with success, and only this with EIO.
        os.fstat(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, parts: Sequence[Buffer]) -> None:
    waiting = deque(memoryview(part).cast("B") for part in parts if len(part))
    while waiting:
        written = os.writev(fd, [waiting[n] for n in range(min(len(waiting), _AT_ONCE))])
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.popleft())
        if written:
            waiting[0] = waiting[0][written:]


def _write_direct(fd: int, parts: Sequence[Buffer]) -> None:
    """The same, with what is page-aligned going straight to the device: a third of the CPU time."""
    from hpckv.store.direct_io import (
        is_aligned,
        open_direct,
    )  # with numpy, which who only looks at a store need not import

    direct_fd, at = open_direct(fd, os.O_WRONLY), 0
    try:
        for part in parts:
            view = memoryview(part).cast("B")
            while view:
                goes_direct = direct_fd >= 0 and is_aligned(view, at)
                try:
                    written = os.pwrite(direct_fd if goes_direct else fd, view, at)
                except OSError as error:
                    if not goes_direct or error.errno != errno.EINVAL:
                        raise
                    os.close(direct_fd)
                    direct_fd = -1  # this filesystem takes only ordinary writes
                    continue
                view, at = view[written:], at + written
    finally:
        if direct_fd >= 0:
            os.close(direct_fd)


def _is_same_file(path: Path, written: os.stat_result) -> bool:
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (written.st_dev, written.st_ino)
