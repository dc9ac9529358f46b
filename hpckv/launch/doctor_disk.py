"""What `hpckv doctor` finds of the filesystem of a store or run, and of the node's own disk: by trying, each look under a limit."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from hpckv.errors import HpckvError
from hpckv.launch.doctor_quota import examine_quota
from hpckv.launch.finding import Clock, Finding, Verdict
from hpckv.quantity import format_bytes
from hpckv.store.local_disk import Mount, filesystem_type, find_local_folder, mount_of
from hpckv.workload.runfile import site_local

_PROBE_BYTES = 64 * 1024**2
_LITTLE_BYTES = 20 * 1024**3

_REFUSED = 11
_TRY_LOCK = f"""
import fcntl, sys
try:
    with open(sys.argv[1]) as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit({_REFUSED})
"""
_LOCAL_LOCKS = frozenset({"localflock", "nolock", "local_lock=all", "local_lock=flock"})
"""Mount options of Lustre and NFS with which a node's locks are unknown to the others."""


def examine_disks(directory: Path, clock: Clock, umask: int) -> Iterator[Finding]:
    """Every finding; one only where the filesystem does not work, or gives no answer."""
    folder = directory
    try:
        folder = clock.within(lambda: _existing(directory))
        mount = clock.within(lambda: mount_of(folder))
        gid = clock.within(lambda: os.stat(folder).st_gid)
        trouble = clock.within(lambda: _try_files(folder))
    except OSError as error:
        remedy = "its server or its mount is down: nothing that lies there can be used"
        yield Finding("filesystem", Verdict.FAIL, f"{folder}: {error.strerror}", remedy)
        return
    if trouble:
        found = f"{folder} ({mount.kind or 'unknown'}): {trouble}"
        yield Finding("filesystem", Verdict.FAIL, found, "choose another folder, or ask for access")
        return
    yield _filesystem(folder, mount)
    yield _in_time(clock, "guarantees", lambda: _guarantees(folder, mount, clock))
    yield _in_time(clock, "space", lambda: _space(folder))
    yield examine_quota(folder, gid, mount, clock)
    yield _in_time(clock, "group", lambda: _group(folder, umask))
    yield _in_time(clock, "local disk", lambda: _local_disk(folder))


def _in_time(clock: Clock, matter: str, look: Callable[[], Finding]) -> Finding:
    try:
        return clock.within(look)
    except OSError as error:
        return Finding(matter, Verdict.FAIL, str(error.strerror), "something is wrong with that disk: ask for it")


def _existing(directory: Path) -> Path:
    """It, or the nearest folder above that is there."""
    return next(folder for folder in (directory, *directory.resolve().parents) if folder.is_dir())


def _try_files(folder: Path) -> str:
    """What does not work as it must; empty if all does."""
    here = folder / f".hpckv-doctor-{secrets.token_hex(6)}"
    there, content = here.with_suffix(".b"), secrets.token_bytes(8192)
    try:
        fd = os.open(here, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            os.write(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.link(here, there)
        os.rename(here, there)  # two names of one file: nothing happens
        os.unlink(there)
        os.rename(here, there)
        if there.read_bytes() != content:
            return "what was written is read back as something else"
        if os.stat(folder).st_mode & 0o2000 and os.stat(there).st_gid != os.stat(folder).st_gid:
            return "new files do not get the folder's group although it is setgid"
    except OSError as error:
        return f"{error.strerror} ({error.filename or folder})"
    finally:
        for path in (here, there):
            path.unlink(missing_ok=True)
    return ""


def _filesystem(folder: Path, mount: Mount) -> Finding:
    kind = mount.kind or "unknown"
    if mount.is_memory:
        remedy = "it is gone with the node, and takes memory: choose a disk for a store or for answers"
        return Finding("filesystem", Verdict.WARN, f"{folder} is in memory ({kind})", remedy)
    return Finding("filesystem", Verdict.PASS, f"{folder} ({kind}): write, fsync, rename, link and read are right")


def _guarantees(folder: Path, mount: Mount, clock: Clock) -> Finding:
    """Tries what runs and stores build on; raises `OSError`."""
    with TemporaryDirectory(prefix=".hpckv-doctor-", dir=folder, ignore_cleanup_errors=True) as name:
        place = Path(name)
        lacking = [
            what
            for what, holds in (
                ("O_EXCL: two starts could both begin a file", _creates_once),
                ("rename over an open file: a start would not see that another took over", _renames_over_open),
                ("fsync: runs end with 73 and stores are only read", _syncs),
            )
            if not holds(place)
        ]
        locks = _locks(place, mount, clock)
    if lacking:
        found = "does not hold: " + "; ".join([*lacking, *([locks] if locks else [])])
        return Finding("guarantees", Verdict.FAIL, found, "choose another folder for runs and stores")
    if locks:
        remedy = "start no second run in one directory; the later one would take over from the earlier"
        return Finding("guarantees", Verdict.WARN, f"{locks}; O_EXCL, rename over an open file and fsync hold", remedy)
    found = "flock between processes, O_EXCL, rename over an open file and fsync hold"
    return Finding("guarantees", Verdict.PASS, found)


def _creates_once(place: Path) -> bool:
    for is_second in (False, True):
        try:
            os.close(os.open(place / "once", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return is_second
    return False


def _renames_over_open(place: Path) -> bool:
    """Whether who has the old file open keeps it, and can tell that the name is another's now."""
    old, new = place / "old", place / "new"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    with old.open("rb") as file:
        os.rename(new, old)
        is_another = os.fstat(file.fileno()).st_ino != os.stat(old).st_ino
        return is_another and file.read() == b"old" and old.read_bytes() == b"new"


def _syncs(place: Path) -> bool:
    for path in (place / "old", place):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError:
            return False
        finally:
            os.close(fd)
    return True


def _locks(place: Path, mount: Mount, clock: Clock) -> str:
    """What `flock` does not do, and what hpckv does then; empty if it keeps other processes out."""
    passes = "hpckv run says so and passes"
    with (place / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"no flock ({error.strerror or errno.errorcode.get(error.errno or 0)}): {passes}"
        done = clock.run([sys.executable, "-I", "-S", "-c", _TRY_LOCK, file.name])
    if done is None or done.returncode not in (0, _REFUSED):
        return "flock of another process was not seen to be refused: it gave no answer"
    if done.returncode != _REFUSED:
        return "flock keeps no other process out: hpckv run does not notice a second one until it takes over"
    local = sorted(_LOCAL_LOCKS & mount.options)
    return f"flock holds on this node only ({local[0]}): a second run on another is not kept out" if local else ""


def _space(folder: Path) -> Finding:
    space = os.statvfs(folder)
    free, files = space.f_bavail * space.f_frsize, space.f_favail
    text = f"{format_bytes(free)} and {files:,} files free" if space.f_files else f"{format_bytes(free)} free"
    is_little = free < _LITTLE_BYTES or (space.f_files and files < 10_000)
    remedy = "a store takes its quota beside; hpckv store gc frees some"
    return Finding("space", Verdict.WARN if is_little else Verdict.PASS, text, remedy if is_little else "")


def _group(folder: Path, umask: int) -> Finding:
    status = os.stat(folder)
    is_shared = bool(status.st_mode & 0o2000)
    if is_shared and status.st_gid not in (*os.getgroups(), os.getegid()) and os.geteuid():
        found = f"{folder} belongs to group {status.st_gid}, which is not yours"
        return Finding("group", Verdict.FAIL, found, "newgrp, or ask")
    if is_shared and umask & 0o070:
        found = f"umask {umask:04o} hides new files from the group of {folder}"
        return Finding("group", Verdict.WARN, found, "hpckv store sets modes itself; for run directories: umask 007")
    found = f"group {status.st_gid}{' (setgid)' if is_shared else ''}, umask {umask:04o}"
    return Finding("group", Verdict.PASS, found)


def _local_disk(store: Path) -> Finding:
    try:
        folder = find_local_folder("auto", store, site_local(os.environ))
    except HpckvError as error:
        return Finding("local disk", Verdict.FAIL, str(error), "correct HPCKV_LOCAL, or what HPCKV_SITE names")
    if folder is None:
        found = "not needed: the store's disk is not on the network, or none is here"
        return Finding("local disk", Verdict.PASS, found)
    free = shutil.disk_usage(folder).free
    where = f"{folder} ({filesystem_type(folder)}): {format_bytes(free)} free"
    remedy = "name a larger one with HPCKV_LOCAL, or ask for --tmp"
    try:
        rate = _write_rate(folder)
    except OSError as error:
        found = f"{where}, but writing {format_bytes(_PROBE_BYTES)} ends with: {error.strerror}"
        return Finding("local disk", Verdict.FAIL, found, f"{remedy}; runs go on without copies")
    found = f"{where}, {format_bytes(rate)}/s written"
    if free < _LITTLE_BYTES:
        return Finding("local disk", Verdict.WARN, found, remedy)
    return Finding("local disk", Verdict.PASS, found)


def _write_rate(folder: Path) -> float:
    """Bytes a second, synced; once, so good for the order of magnitude. Raises `OSError`."""
    path, data = folder / f".hpckv-doctor-{secrets.token_hex(6)}", secrets.token_bytes(_PROBE_BYTES)
    try:
        begun = time.perf_counter()
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return _PROBE_BYTES / (time.perf_counter() - begun)
    finally:
        path.unlink(missing_ok=True)
