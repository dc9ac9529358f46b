"""What STORE.json says: who shares the store, how much it may hold, and how long things stay."""

from __future__ import annotations

import json
import secrets
from typing import Any, Literal

from hpckv.errors import ConfigError
from hpckv.quantity import ByteSize
from hpckv.schema import Config, to_plain

Bridging = Literal["off", "exact", "any"]
"""Which other dtypes' blocks may be converted and used: none, those whose values stay what they are, all."""

FORMAT = "hpckv store"
FORMAT_VERSION = 1


class Quota(Config, frozen=True):
    """Upper bounds; None is none. Files count as much as bytes: scratch filesystems allow 10 to 50 thousand a TB."""

    bytes: ByteSize | None = None
    """Of the whole store."""
    files: int | None = None
    """Of the whole store, segments and everything else."""
    user_bytes: ByteSize | None = None
    """Of each user's segments."""
    user_files: int | None = None
    """Of each user's files."""
    free: ByteSize = ByteSize(0)
    """Nothing is written while the filesystem has less than this free."""

    def __post_init__(self) -> None:
        for name in ("files", "user_files"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ConfigError(f"quota.{name}: {limit} is not above 0")


class StorePolicy(Config, frozen=True):
    """STORE.json."""

    format: str
    version: int
    uuid: str
    epoch: int = 0
    """Key epoch in use: `key/EPOCH.key`."""
    group: int | None = None
    """gid of the project that shares the store; None: private to its owner."""
    quota: Quota = Quota()
    keep_days: float = 30.0
    """Segments unused for so long are collected first of all."""
    trust: Literal["project", "self"] = "project"
    """Whose segments a member reads: everybody's with a folder of their own, or only one's own."""
    distrusted: tuple[int, ...] = ()
    """uids whose segments nobody reads any more."""
    bridging: Bridging = "exact"
    """The most that a run's `store.bridging` may ask for."""

    @classmethod
    def new(cls, **settings: Any) -> StorePolicy:
        """Of a new store; private unless `group` is given."""
        return cls(format=FORMAT, version=FORMAT_VERSION, uuid=secrets.token_hex(16), **settings)

    def to_json(self) -> bytes:
        return json.dumps(to_plain(self), indent=2).encode() + b"\n"
