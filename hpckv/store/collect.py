"""Keeping a store within its quota: which segments go first, and nothing of another's is touched.

Everybody computes the same order from the same files and deletes what of it is their own, so a project's quota needs no
daemon and no lock. Two collectors at once delete one file once; a reader that comes too late has a miss.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpckv.errors import HpckvError
from hpckv.log import warn_once
from hpckv.quantity import format_bytes
from hpckv.store.config import PINNED_S
from hpckv.store.durable import publish
from hpckv.store.foreign_file import UnusableFileError
from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.store.segment import read_trailer
from hpckv.store.survey import HEAT_EVERY_S, StoredFile, Survey, Use, merged_heat_record

_log = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]+-(?P<host>.+)-(?P<pid>[0-9]+)")
_HEAT_FILES = 8
"""Own heat files from which on they are merged."""

ORPHAN_S = 8 * 86400.0
"""A temporary file this old belongs to no writer any more, whatever a site's wall time is."""


@dataclass(frozen=True)
class Limit:
    """One bound and how much stands against it."""

    name: str
    files: Sequence[StoredFile]
    max_bytes: int | None
    max_files: int | None


def in_order_of_worth(
    files: Sequence[StoredFile], uses: Mapping[Path, Use], keep_s: float, now: float
) -> list[StoredFile]:
    """The least worth keeping first: unused for longer than `keep_s`, then few reads for their bytes, then the oldest.

    A segment's own `keep_s` comes before the store's; pinned ones are not in it at all.
    """

    def worth(file: StoredFile) -> tuple[bool, float, float]:
        use = uses.get(file.path, Use())
        return not is_expired(file, use, now, keep_s), use.heat / max(1, file.num_bytes), _touched(file, use)

    loose = [file for file in files if uses.get(file.path, Use()).keep_s != PINNED_S]
    return sorted(loose, key=lambda file: (worth(file), file.path))


def is_expired(file: StoredFile, use: Use, now: float, keep_s: float) -> bool:
    """Whether it has not been used for as long as it should be kept, by its own class or else by the store's `keep_s`."""
    kept = use.keep_s + HEAT_EVERY_S if use.keep_s else keep_s  # a use may not be logged yet
    return use.keep_s != PINNED_S and now - _touched(file, use) > kept


def _touched(file: StoredFile, use: Use) -> float:
    return max(use.last, file.written_at)


def limits(policy: StorePolicy, survey: Survey, uid: int) -> list[Limit]:
    """The store's bound, and the user's."""
    files = list(survey.files.values())
    own = [file for file in files if file.uid == uid]
    quota = policy.quota
    return [
        Limit("quota", files, quota.bytes, quota.files),
        Limit("user quota", own, quota.user_bytes, quota.user_files),
    ]


def choose(
    limit: Limit, ordered: Sequence[StoredFile], *, more_bytes: int = 0, more_files: int = 0
) -> list[StoredFile]:
    """What must go for the limit to hold with `more_bytes` in `more_files` added; all there is, if even that is too little."""
    excess_bytes = (
        sum(f.num_bytes for f in limit.files)
        + more_bytes
        - (limit.max_bytes if limit.max_bytes is not None else 1 << 62)
    )
    excess_files = len(limit.files) + more_files - (limit.max_files if limit.max_files is not None else 1 << 62)
    among, victims = set(limit.files), []
    for file in ordered:
        if excess_bytes <= 0 and excess_files <= 0:
            break
        if file in among:
            victims.append(file)
            excess_bytes -= file.num_bytes
            excess_files -= 1
    return victims


class Collector:
    """Makes room in a store for one user's segments, by deleting that user's own."""

    def __init__(
        self,
        root: StoreRoot,
        *,
        is_pinned: Callable[[Path], bool] = lambda _: False,
        on_deleted: Callable[[Path], None] = lambda _: None,
    ) -> None:
        """`on_deleted` hears of each segment before its file goes."""
        self._root, self._is_pinned, self._on_deleted = root, is_pinned, on_deleted
        self._survey = Survey(root.layout)
        self._uid = os.getuid()
        self._lock = threading.Lock()
        self._classes: dict[Path, int] = {}
        """`keep_s` of own segments by their trailers, as far as they were looked at."""
        self.num_deleted = 0
        self.deleted_bytes = 0

    def make_room(self, num_bytes: int, num_files: int = 1) -> bool:
        """Whether a file of `num_bytes` may be written, after deleting what should go first. Raises `OSError`."""
        with self._lock:
            self._survey.refresh()
            if self._is_bounded():
                self._delete_excess(num_bytes, num_files)
            room = self._room(num_bytes, num_files)
        if room:
            warn_once(_log, f"store {self._root.layout.root}: {room}; new blocks are not kept for now")
        return not room

    def collect(self) -> list[StoredFile]:
        """Bring own files within quota, delete what has expired, sweep own orphans; returns what was deleted.

        Raises `OSError`.
        """
        with self._lock:
            self._survey.refresh()
            deleted = self._delete_expired() + self._delete_excess(0, 0) + self._sweep()
            self._merge_heat()
            return deleted

    def _is_bounded(self) -> bool:
        quota = self._root.policy.quota
        return bool(quota.free) or any(
            bound is not None for bound in (quota.bytes, quota.files, quota.user_bytes, quota.user_files)
        )

    def _delete_excess(self, num_bytes: int, num_files: int) -> list[StoredFile]:
        while True:
            victims = self._excess(num_bytes, num_files)
            unsure = [f for f in victims if f.path not in self._classes]
            for file in unsure:  # a log may be late or lost; what the file itself says is read before it goes
                self._classes[file.path] = self._class_of(file)
            if not any(self._classes[f.path] for f in unsure):
                return [file for file in victims if self._delete(file)]

    def _class_of(self, file: StoredFile) -> int:
        """`keep_s` of its trailer; 0 if there is none to be read."""
        try:
            epoch_key = self._root.epoch_key(int(file.namespace.rpartition(".")[2]))
            return read_trailer(file.path, epoch_key, frozenset({self._uid})).keep_s
        except (OSError, UnusableFileError, HpckvError, ValueError):
            return 0

    def _excess(self, num_bytes: int, num_files: int) -> list[StoredFile]:
        """Which own segments must go."""
        now, policy = time.time(), self._root.policy
        uses = self._survey.uses(now)
        for path, keep_s in self._classes.items():
            uses[path] = uses.get(path, Use()) + Use(keep_s=keep_s)
        ordered = in_order_of_worth(self._survey.segments(), uses, policy.keep_days * 86400, now)
        victims: dict[Path, StoredFile] = {}
        for limit in limits(policy, self._survey, self._uid):
            for file in choose(limit, ordered, more_bytes=num_bytes, more_files=num_files):
                victims[file.path] = file
        if policy.quota.free and (short := policy.quota.free + num_bytes - self._survey.free_bytes()) > 0:
            for file in (f for f in ordered if f.uid == self._uid):
                if short <= 0:
                    break
                victims[file.path] = file
                short -= file.num_bytes
        return [file for file in victims.values() if file.uid == self._uid]

    def _delete_expired(self) -> list[StoredFile]:
        """Delete own segments whose own class says so; what only the store's `keep_days` says waits for pressure."""
        now, uses = time.time(), self._survey.uses()
        classed = [f for f in self._survey.segments(self._uid) if uses.get(f.path, Use()).keep_s]
        return [f for f in classed if is_expired(f, uses[f.path], now, 0) and self._delete(f)]

    def _merge_heat(self) -> None:
        """One own heat file instead of many, without what is gone."""
        logs = [f for f in self._survey.files.values() if f.kind == "heat" and f.uid == self._uid]
        if len(logs) < _HEAT_FILES:
            return
        now = time.time()
        present = {
            str(path.relative_to(self._root.layout.users)): use
            for path, use in self._survey.uses(now, of=logs).items()
            if path in self._survey.files
        }
        merged = logs[0].path.with_name(f"{secrets.token_hex(16)}.json")
        publish(merged, [merged_heat_record(present, now)], gid=self._root.policy.group)
        for log in logs:
            log.path.unlink(missing_ok=True)

    def _sweep(self) -> list[StoredFile]:
        """Delete own temporary files that nobody can be writing any more."""
        orphans = [f for f in self._survey.files.values() if f.kind == "temporary" and f.uid == self._uid]
        return [f for f in orphans if is_orphan(f) and self._delete(f)]

    def _delete(self, file: StoredFile) -> bool:
        if self._is_pinned(file.path):
            return False
        self._on_deleted(file.path)
        try:
            file.path.unlink()
        except FileNotFoundError:
            pass  # another collector of this user was faster
        except OSError as error:
            warn_once(_log, f"{file.path}: {error.strerror}; not collected")
            return False
        self._survey.files.pop(file.path, None)
        self.num_deleted += 1
        self.deleted_bytes += file.num_bytes
        return True

    def _room(self, num_bytes: int, num_files: int) -> str:
        """Empty, or which bound stands in the way."""
        for limit in limits(self._root.policy, self._survey, self._uid):
            held = sum(f.num_bytes for f in limit.files)
            if limit.max_bytes is not None and held + num_bytes > limit.max_bytes:
                return f"{limit.name}: {format_bytes(held)} of {format_bytes(limit.max_bytes)} are in use"
            if limit.max_files is not None and len(limit.files) + num_files > limit.max_files:
                return f"{limit.name}: {len(limit.files)} of {limit.max_files} files are in use"
        if (watermark := self._root.policy.quota.free) and self._survey.free_bytes() - num_bytes < watermark:
            return f"less than {format_bytes(watermark)} are free on the filesystem"
        return ""


def is_orphan(file: StoredFile) -> bool:
    """Whether a temporary file's writer is gone: a process of this host and boot that lives no more, or simply too old."""
    if time.time() - file.written_at > ORPHAN_S:
        return True
    found = _TEMPORARY.fullmatch(file.path.name)
    if found is None or found["host"] != os.uname().nodename:
        return False
    return not Path(f"/proc/{found['pid']}").exists()
