"""Which folder of this node's own disk copies go to, if any."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from hpckv.errors import AccessError
from hpckv.log import warn_once

_log = logging.getLogger(__name__)

_NETWORK = frozenset(
    {"lustre", "nfs", "nfs4", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "afs", "pvfs2", "panfs", "wekafs", "dvs"}
    | {"fuse.glusterfs", "fuse.sshfs"}
)
_MEMORY = frozenset({"tmpfs", "ramfs"})


def find_local_folder(setting: str, store: Path, site: str | None = None) -> Path | None:
    """The folder for `store.local`: a path, `none`, or `auto`.

    `auto` wants copies only where the store lies on a network filesystem, or $HPCKV_LOCAL names a folder, and takes the first of
    $HPCKV_LOCAL, $SLURM_TMPDIR, `site` (a site file's), $TMPDIR, /local/$USER/$SLURM_JOB_ID, /tmp that can be written to; what
    nobody named, only if it is neither on the network nor in memory. Raises `AccessError` if a folder that was asked for cannot
    be written to; a site's is then said once and passed over.
    """
    asked = os.environ.get("HPCKV_LOCAL") if setting == "auto" else None if setting == "none" else setting
    if asked:
        folder = Path(asked)
        if not _is_usable(folder):
            raise AccessError(f"{folder}: named as the node's own disk, and is no folder that can be written to")
        return folder
    if setting == "none" or not is_on_network(store):
        return None
    user, job = os.environ.get("USER", ""), os.environ.get("SLURM_JOB_ID", "")
    candidates = [
        os.environ.get("SLURM_TMPDIR"),
        site,
        os.environ.get("TMPDIR"),
        f"/local/{user}/{job}" if job else None,
        "/tmp",
    ]
    for place in filter(None, candidates):
        folder = Path(place)
        if _is_usable(folder):
            mount = mount_of(folder)
            if place == site or not (mount.is_on_network or mount.is_memory):
                return folder
        elif place == site:
            warn_once(
                _log, f"{site}: the site file's local disk is no folder that can be written to; the next place is tried"
            )
    return None


def _is_usable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def own_folder(place: Path, name: str) -> Path:
    """This user's folder in a place that all users of the node write to; raises `OSError` if it is not this user's alone."""
    folder = place / f"{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_own(folder):
        raise PermissionError(errno.EPERM, "not a folder of yours alone", str(folder))
    return folder


def left_folders(place: Path, name: str) -> Iterator[Path]:
    """This user's folders as `own_folder` makes them: in `place` and, where that is this job's, in the places other jobs left."""
    job = os.environ.get("SLURM_JOB_ID")
    places = [place]
    if job and job in place.name:
        beside = place.parent.glob(escape(place.name).replace(job, "*"))
        places += [other for other in beside if other != place and other.lstat().st_uid == os.getuid()]
    for folder in (each / f"{name}-{os.getuid()}" for each in places):
        with suppress(OSError):
            if _is_own(folder):
                yield folder


def _is_own(folder: Path) -> bool:
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


@dataclass(frozen=True)
class Mount:
    """A mounted filesystem, as /proc/self/mountinfo has it; all empty if unknown."""

    point: str = ""
    kind: str = ""
    source: str = ""
    options: frozenset[str] = frozenset()

    @property
    def is_on_network(self) -> bool:
        """Whether other nodes see it."""
        return self.kind in _NETWORK

    @property
    def is_memory(self) -> bool:
        return self.kind in _MEMORY


def mount_of(path: Path) -> Mount:
    """What a path lies on."""
    resolved = str(path.resolve())
    found = Mount()
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return found
    for line in mounts:
        before, _, after = line.partition(" - ")
        fields = before.split()
        point = fields[4].encode().decode("unicode_escape")
        is_above = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if is_above and len(point) >= len(found.point):  # of two mounts on one point the later is seen
            kind, source, options = after.split(" ", 2)
            found = Mount(point, kind, source, frozenset([*fields[5].split(","), *options.split(",")]))
    return found


def is_on_network(path: Path) -> bool:
    """Whether a path is on a filesystem that other nodes see."""
    return mount_of(path).is_on_network


def filesystem_type(path: Path) -> str:
    """As /proc/self/mountinfo names it; empty if unknown."""
    return mount_of(path).kind
