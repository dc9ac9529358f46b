"""A store's root folder: making it, opening it safely, and one user's own folders in it.

Shared stores have one group-writable folder, `u/`, sticky and owned by the store's owner: members can make a folder of
their own there and touch nobody else's. So the owner of a file tells reliably who wrote it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hpckv.errors import AccessError, ConfigError, StoreError
from hpckv.schema import convert
from hpckv.store.durable import publish
from hpckv.store.foreign_file import UnusableFileError, open_trusted
from hpckv.store.layout import StoreLayout
from hpckv.store.ownership import is_of_group
from hpckv.store.policy import FORMAT, FORMAT_VERSION, StorePolicy

EPOCH_KEY_BYTES = 32
_SHARED_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class StoreRoot:
    """An existing store, checked."""

    layout: StoreLayout
    policy: StorePolicy
    owner: int
    """uid of the store's owner: who owns STORE.json."""

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether there is a store, also one that this user cannot look into."""
        try:
            return StoreLayout(path).marker.exists()
        except OSError:
            return True

    @classmethod
    def create(cls, path: Path, policy: StorePolicy) -> StoreRoot:
        """Make a store, or open the one that another process made in the same moment.

        With `policy.group` its folders get that group and the modes that let members write only below their own.
        Raises `StoreError` or `AccessError`; checks that the filesystem really did what was asked.
        """
        layout, group = StoreLayout(path), policy.group
        if path.is_dir() and any(path.iterdir()) and not layout.keys.is_dir():
            raise StoreError(f"store {path}: the folder is neither empty nor an hpckv store")
        modes = {path: 0o2750, layout.keys: 0o2750, layout.plan: 0o2750, layout.users: 0o3770}
        try:
            for folder, mode in modes.items():
                _make_folder(folder, mode if group is not None else 0o700, group)
            _publish_once(layout.key(policy.epoch), secrets.token_bytes(EPOCH_KEY_BYTES), group)
            _publish_once(layout.marker, policy.to_json(), group)
        except PermissionError as error:
            raise AccessError(f"store {path}: {error.filename or path}: {error.strerror}") from None
        except OSError as error:
            raise StoreError(f"store {path}: {error.strerror}") from None
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> StoreRoot:
        """Raises `StoreError` (not a store, damaged, unsafe) or `AccessError`."""
        layout = StoreLayout(path)
        try:
            content, status = _read_trusted(layout.marker)
            users = layout.users.stat()
        except UnusableFileError as error:
            raise StoreError(f"{layout.marker}: {error}") from None
        except FileNotFoundError:
            raise StoreError(
                f"store {path}: no store there (no STORE.json); make one with: hpckv store init {path}"
            ) from None
        except PermissionError as error:
            raise AccessError(f"store {path}: {error.filename}: permission denied") from None
        except OSError as error:
            raise StoreError(f"store {path}: {error.strerror}") from None
        if users.st_uid != status.st_uid:
            raise StoreError(f"{layout.users}: belongs to uid {users.st_uid}, not to the store's owner {status.st_uid}")
        if users.st_mode & _SHARED_WRITE and not users.st_mode & stat.S_ISVTX:
            raise StoreError(f"{layout.users}: its members could replace each other's folders; chmod +t {layout.users}")
        return cls(layout, _parse(layout.marker, content), status.st_uid)

    def epoch_key(self, epoch: int | None = None) -> bytes:
        """The secret of an epoch, by default the one in use; raises `StoreError` or `AccessError`."""
        path = self.layout.key(self.policy.epoch if epoch is None else epoch)
        try:
            key, status = _read_trusted(path)
        except PermissionError:
            raise AccessError(f"{path}: permission denied; are you a member of the store's group?") from None
        except (UnusableFileError, OSError) as error:
            raise StoreError(f"{path}: {error}") from None
        if len(key) != EPOCH_KEY_BYTES or status.st_uid != self.owner:
            raise StoreError(f"{path}: damaged or not the store owner's")
        return key

    def distrust(self, uid: int, *, is_trusted: bool = False) -> StoreRoot:
        """Let nobody read a user's segments from now on, or everybody again. Owner only; raises `AccessError`."""
        listed = {*self.policy.distrusted, uid} - ({uid} if is_trusted else set())
        return self._set_policy("decides whom to trust", distrusted=tuple(sorted(listed)))

    def _set_policy(self, what: str, **changes: Any) -> StoreRoot:
        policy = msgspec.structs.replace(self.policy, **changes)
        try:
            publish(self.layout.marker, [policy.to_json()], mode=0o640, gid=self.policy.group)
        except OSError as error:
            raise AccessError(f"store {self.layout.root}: {error.strerror}; only its owner {what}") from None
        return StoreRoot.open(self.layout.root)

    def rotate(self) -> StoreRoot:
        """Begin a new key epoch: nothing stored so far is found by runs that start from now on. Owner only.

        Raises `AccessError`.
        """
        epoch = self.policy.epoch + 1
        try:
            _publish_once(self.layout.key(epoch), secrets.token_bytes(EPOCH_KEY_BYTES), self.policy.group)
        except OSError as error:
            raise AccessError(f"store {self.layout.root}: {error.strerror}; only its owner rotates the key") from None
        return self._set_policy("rotates the key", epoch=epoch)

    def trusted_uids(self) -> frozenset[int] | None:
        """Whose segments are read; None: everybody's who has a folder of their own."""
        return frozenset({os.getuid()}) if self.policy.trust == "self" else None

    def own_salt(self) -> str:
        """The secret that this user's private runs salt their keys with, made on first use; raises `OSError`."""
        path = self.layout.salt(os.getuid())
        self.make_own_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            publish(path, [secrets.token_bytes(EPOCH_KEY_BYTES)], mode=0o400, replace=False, gid=self.policy.group)
        try:
            salt, status = _read_trusted(path)
        except UnusableFileError as error:
            raise StoreError(f"{path}: {error}") from None
        if len(salt) != EPOCH_KEY_BYTES or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise StoreError(f"{path}: damaged, or not yours alone")
        return salt.hex()

    def make_own_folder(self, folder: Path, *, is_private: bool = False) -> None:
        """Make a folder below this user's own, readable by the project or not; raises `OSError`."""
        own = self.layout.user(os.getuid())
        mode = 0o700 if self.policy.group is None else 0o2750
        missing: list[Path] = []
        while folder != own and not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for part in (own, *reversed(missing)):
            if not part.is_dir():
                _make_folder(part, 0o700 if is_private and part == missing[0] else mode, self.policy.group)
        if own.lstat().st_uid != os.getuid():
            raise PermissionError(1, "belongs to somebody else", str(own))


def _parse(path: Path, content: bytes) -> StorePolicy:
    try:
        given = json.loads(content)
    except ValueError:
        raise StoreError(f"{path}: damaged, not readable as JSON") from None
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise StoreError(f"{path}: not an hpckv store")
    if given.get("version") != FORMAT_VERSION:
        raise StoreError(f"{path}: store version {given.get('version')}, this program reads {FORMAT_VERSION}")
    try:
        return convert(given, StorePolicy, str(path))
    except (ConfigError, msgspec.ValidationError) as error:
        raise StoreError(str(error)) from None


def _make_folder(folder: Path, mode: int, group: int | None) -> None:
    """mkdir -p, then mode and group, and a look at what came of it."""
    folder.mkdir(parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        return  # made by somebody else in the same moment, who sets it up
    if group is not None and not is_of_group(status, group):
        os.chown(folder, -1, group)
    if stat.S_IMODE(status.st_mode) != mode:
        folder.chmod(mode)
    found = folder.stat()
    if stat.S_IMODE(found.st_mode) != mode or (group is not None and not is_of_group(found, group)):
        raise PermissionError(
            1,
            f"the filesystem gave mode {stat.S_IMODE(found.st_mode):o} and group {found.st_gid} "
            f"instead of {mode:o} and {group}",
            str(folder),
        )


def _publish_once(path: Path, content: bytes, group: int | None) -> None:
    with contextlib.suppress(FileExistsError):  # another process was faster; its file holds
        publish(path, [content], mode=0o640, replace=False, gid=group)


def _read_trusted(path: Path) -> tuple[bytes, os.stat_result]:
    for is_last in (False, True):
        try:
            fd, status = open_trusted(path, None)
            with os.fdopen(fd, "rb") as file:
                return file.read(), status
        except OSError as error:
            if is_last or error.errno != errno.ESTALE:  # replaced between its name and its content
                raise
    raise AssertionError("not reached")
