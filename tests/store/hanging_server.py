"""The program behind `hanging_fs`: serves one FUSE mount, and before each call looks whether it should hang."""

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mfusepy


def _obeys(name: str, call: Callable) -> Callable:
    @functools.wraps(call)
    def obeying(self, *args):
        while name in self._orders.read_text().split():
            time.sleep(0.02)
        try:
            return call(self, *args)
        except OSError as error:
            raise mfusepy.FuseOSError(error.errno) from None

    return obeying


class _PassThrough(mfusepy.Operations):
    """Every call goes to the folder behind; no `flush`: closing a file asks no server, as on most networks."""

    use_ns = True

    def __init__(self, behind: str, orders: Path) -> None:
        self._behind, self._orders = behind, orders

    def _at(self, path: str) -> str:
        return self._behind + path

    def getattr(self, path, fh=None):
        found = os.lstat(self._at(path)) if fh is None else os.fstat(fh)
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino")
        times = {f"st_{n}time": getattr(found, f"st_{n}time_ns") for n in "acm"}
        return {**{name: getattr(found, name) for name in names}, **times}

    def readdir(self, path, fh):
        return [".", "..", *os.listdir(self._at(path))]

    def statfs(self, path):
        found = os.statvfs(self._at(path))
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_") and name != "f_fsid"}

    def mkdir(self, path, mode):
        os.mkdir(self._at(path), mode)

    def rmdir(self, path):
        os.rmdir(self._at(path))

    def chmod(self, path, mode):
        os.chmod(self._at(path), mode)

    def chown(self, path, uid, gid):
        os.chown(self._at(path), uid, gid)

    def unlink(self, path):
        os.unlink(self._at(path))

    def rename(self, old, new):
        os.rename(self._at(old), self._at(new))

    def link(self, target, source):
        os.link(self._at(source), self._at(target))

    def open(self, path, flags):
        return os.open(self._at(path), flags)

    def create(self, path, mode, fi=None):
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def read(self, path, size, offset, fh):
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):
        return os.pwrite(fh, data, offset)

    def fsync(self, path, datasync, fh):
        os.fsync(fh)

    def release(self, path, fh):
        os.close(fh)


for _name, _call in list(vars(_PassThrough).items()):
    if callable(_call) and not _name.startswith("_"):
        setattr(_PassThrough, _name, _obeys(_name, _call))


def serve(behind: str, point: str, orders: Path) -> None:
    """Until it is unmounted. Nothing is cached: every call gets here."""
    uncached = {"attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0, "direct_io": True, "hard_remove": True}
    mfusepy.FUSE(_PassThrough(behind, orders), point, foreground=True, **uncached)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
