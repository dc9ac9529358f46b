"""Letting another project read a store: an access control list for its group on everything that is yours.

The store's owner opens the store itself, every member their own blocks; what is made later inherits it. Nothing private
is touched, and nobody gets to write.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hpckv.errors import StoreError
from hpckv.store.root import StoreRoot

_AT_ONCE = 500


def share(root: StoreRoot, gid: int, *, revoke: bool = False) -> int:
    """Let the group `gid` read what this user owns of the store, or no longer; returns how many files and folders.

    Raises `StoreError` where the filesystem has no POSIX access control lists.
    """
    setfacl = shutil.which("setfacl")
    if setfacl is None:
        raise StoreError("setfacl is not installed here; it comes with the package acl")
    passages = _passages(root)
    folders, files = list(_own_folders(root)), list(_own_files(root))
    # What is made in one's own folders inherits it; whoever makes a folder beside them decides for themselves.
    for paths, entry in ((passages, f"g:{gid}:rx"), (folders, f"g:{gid}:rx,d:g:{gid}:rx"), (files, f"g:{gid}:r")):
        change = ["-x", ",".join(part.rpartition(":")[0] for part in entry.split(","))] if revoke else ["-m", entry]
        for at in range(0, len(paths), _AT_ONCE):
            batch = [str(path) for path in paths[at : at + _AT_ONCE]]
            done = subprocess.run([setfacl, *change, "--", *batch], capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["setfacl failed"])[0]
                raise StoreError(f"store {root.layout.root}: {reason}")
    return len(passages) + len(folders) + len(files)


def _passages(root: StoreRoot) -> list[Path]:
    """What belongs to the store itself, of its owner."""
    layout = root.layout
    return [layout.root, layout.keys, layout.plan, layout.users] if root.owner == os.getuid() else []


def _own_folders(root: StoreRoot) -> Iterator[Path]:
    layout = root.layout
    for folder, _, _ in _open_part(layout.user(os.getuid())):
        yield Path(folder)


def _own_files(root: StoreRoot) -> Iterator[Path]:
    layout = root.layout
    if root.owner == os.getuid():
        yield layout.marker
        yield from layout.keys.glob("*.key")
    for folder, _, names in _open_part(layout.user(os.getuid())):
        for name in names:
            path = Path(folder, name)
            if _is_group_readable(path):
                yield path


def _open_part(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Of a user's folder what the project may read: nothing of private runs."""
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if _is_group_readable(Path(path, name))]
        yield path, folders, names


def _is_group_readable(path: Path) -> bool:
    try:
        return bool(path.lstat().st_mode & stat.S_IRGRP)
    except OSError:
        return False  # collected meanwhile
