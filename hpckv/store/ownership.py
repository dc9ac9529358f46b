"""Whose a file is, also where the kernel does not tell.

Apptainer without setuid runs its processes in a user namespace that knows one user and one group: files of everybody else show the
overflow ids (65534), so a colleague's file cannot be told from another colleague's. There the name of the owner's folder, which
nobody else can write to, and the keyed digest of the file's own header have to do. What cannot be checked is who made a folder
that its owner has not made yet: docs/store-format.md.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path


def is_of_user(status: os.stat_result, uid: int) -> bool:
    """Whether the file is, or in this user namespace may be, that user's."""
    return _may_be(status.st_uid, uid, "uid")


def is_of_group(status: os.stat_result, gid: int) -> bool:
    """Whether the file's group is, or in this user namespace may be, that one."""
    return _may_be(status.st_gid, gid, "gid")


def _may_be(shown: int, wanted: int, kind: str) -> bool:
    return shown == wanted or (shown == _overflow(kind) and not any(wanted in ids for ids in _shown_ids(kind)))


@functools.cache
def _overflow(kind: str) -> int:
    try:
        return int(Path(f"/proc/sys/kernel/overflow{kind}").read_text())
    except (OSError, ValueError):
        return 65534


@functools.cache
def _shown_ids(kind: str) -> tuple[range, ...]:
    """Those that are shown as they are; all, if the system does not say."""
    try:
        rows = [line.split() for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()]
        return tuple(range(int(first), int(first) + int(count)) for first, _, count in rows)
    except (OSError, ValueError):
        return (range(2**32),)
