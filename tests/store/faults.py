"""Make the n-th system call on a store fail, in this process: an error, a short write, a lost reply, death."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

ERRORS = ("ENOSPC", "EDQUOT", "EIO", "ESTALE")
KINDS = (*ERRORS, "short write", "lost reply", "kill")
CALLS = (
    *("open", "write", "writev", "pwrite", "preadv", "pread", "fsync", "fstat", "fchmod", "rename", "link", "unlink"),
    *("scandir", "stat", "lstat", "mkdir", "chmod", "chown"),
)


class Faults:
    """Counts calls that concern `root`, and spoils number `nth` (from 1); 0 only counts."""

    def __init__(self, root: Path, nth: int, kind: str) -> None:
        self.root, self.nth, self.kind = str(root), nth, kind
        self.count = 0
        self.spoiled = ""
        self._fds: set[int] = set()

    def install(self) -> None:
        """For the rest of this process's life."""
        for name in CALLS:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _concerns(self, args: tuple) -> bool:
        first = args[0] if args else ""
        if isinstance(first, int):
            return first in self._fds
        if not isinstance(first, (str, os.PathLike)):
            return False
        name = os.fspath(first)
        if name.startswith("/proc/self/fd/"):  # the same file, opened once more
            return int(name.rpartition("/")[2]) in self._fds
        return name.startswith(self.root)

    def _wrap(self, name: str, real: Callable) -> Callable:
        def call(*args, **options):
            if not self._concerns(args):
                if name == "open" and args:
                    return self._forget(real(*args, **options))
                return real(*args, **options)
            self.count += 1
            if self.count == self.nth:
                self.spoiled = name
                return self._spoil(name, real, args, options)
            result = real(*args, **options)
            if name == "open":
                self._fds.add(result)
            return result

        return call

    def _forget(self, fd: int) -> int:
        self._fds.discard(fd)  # the number is another file's now
        return fd

    def _spoil(self, name: str, real: Callable, args: tuple, options: dict):
        if self.kind == "kill":
            os._exit(137)
        if self.kind == "short write":
            if name == "writev":
                return os.write(args[0], memoryview(args[1][0]).cast("B")[:7])
            if name == "pwrite":
                view = memoryview(args[1]).cast("B")
                return real(args[0], view[: 4096 if len(view) > 4096 else 7], args[2])
            result = real(*args, **options)
        elif self.kind == "lost reply" and name in ("rename", "link", "unlink", "mkdir"):
            real(*args, **options)
            raise OSError(errno.EIO, "the reply was lost")
        elif self.kind == "lost reply":
            result = real(*args, **options)
        else:
            number = getattr(errno, self.kind)
            raise OSError(number, os.strerror(number), *(a for a in args[:1] if not isinstance(a, int)))
        if name == "open":
            self._fds.add(result)
        return result
