"""The contract every KV-block tier keeps: host RAM, node-local SSD, shared filesystem.

A tier maps a block key (32 bytes) to immutable bytes of one fixed size. It knows nothing of tensors, ranks or
requests, and no tier calls another (see `tiered_store`).

    present()   from memory, no I/O: whether a get() of each key is worth trying
    writer()    from memory, no I/O: the uid of whose block it is, for the ledger; None where a tier keeps copies only
    get()       the exact bytes that were put, verified in the buffer that is returned - or a miss; never an exception
    put()       takes a copy, unless it is told that nobody will change the payload any more; never blocks on a device
    flush()     once it returns, every block put() answered STORED for is as durable as the tier ever makes it
                (on disk and visible to every process for a file tier; nothing to do for host RAM)
    pin()       protects blocks from eviction until as many unpin()s
    evict()     frees unpinned blocks, least recently used first

Blocks are written once and never modified, so readers take no lock. A get() that fails for any reason - the file is
gone, the disk answers with an error, the digest is wrong - is a miss, counted by cause: a tier can make a run
faster, never wrong and never stuck. put() never blocks on a device: under pressure it drops.

All methods may be called from any thread of one process. Every implementation must pass
`hpckv.testing.tier_suite.TierSuite`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from hpckv.store.block import BlockGeometry
from hpckv.store.segment import StoredBlock


class PutOutcome(Enum):
    """What became of a put."""

    STORED = "stored"
    """Kept: get() serves it at once, other processes after flush()."""
    DUPLICATE = "duplicate"
    """Already there; nothing was done."""
    DROPPED = "dropped"
    """No room, too busy, or writing is off: as if it had never been put."""


@dataclass
class TierStats:
    """Counters that only grow; seconds are the callers' waiting time."""

    hits: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    """By cause: absent, gone, io, damaged, partial (its tiles do not cover this rank's box), overflow (of a bridge), throttled,
    timeout."""
    stored: int = 0
    dropped: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    read_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def count_hit(self, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self.hits += 1
            self.read_bytes += num_bytes
            self.read_s += seconds

    def count_miss(self, cause: str) -> None:
        with self._lock:
            self.misses[cause] += 1

    @property
    def record(self) -> dict[str, object]:
        """The counters as plain data."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class Tier(ABC):
    """One level of the KV-block hierarchy."""

    name: str
    """`host`, `local` or `shared`: where a hit is counted."""
    survives_process: bool
    """Whether another process finds what this one put and flushed."""
    keeps_copies_only: bool = False
    """Whether it is offered only what was read from a farther tier."""
    is_bridge: bool = False
    """Whether its blocks are converted from another dtype, and must reach no disk."""
    geometry: BlockGeometry
    stats: TierStats

    @property
    def label(self) -> str:
        """Under which its own counters are reported."""
        return self.name

    @abstractmethod
    def present(self, keys: Sequence[bytes]) -> np.ndarray:
        """Whether the tier believes it has each block, (n,) bool. No I/O; may be wrong either way, get() decides."""

    @abstractmethod
    def get(self, key: bytes) -> memoryview | None:
        """The block's bytes, or None for a miss. Nobody changes them any more, and the caller must not either."""

    def writer(self, key: bytes) -> int | None:
        """The uid of who computed and put a block that is present; None if the tier does not know. No I/O."""
        return None

    @abstractmethod
    def put(self, block: StoredBlock, *, keeps_payload: bool = False) -> PutOutcome:
        """Take the block. Idempotent: a key that is already there is left as it is.

        With `keeps_payload` nobody will change the payload any more, so that no copy is needed.
        """

    @abstractmethod
    def flush(self) -> None:
        """Wait until everything put so far is as durable as this tier makes it. Errors turn writing off, once logged."""

    @abstractmethod
    def pin(self, keys: Iterable[bytes]) -> None:
        """Protect present blocks from eviction; counts up. Absent keys are ignored."""

    @abstractmethod
    def unpin(self, keys: Iterable[bytes]) -> None:
        """Undo one pin() of each key."""

    @abstractmethod
    def evict(self, num_bytes: int) -> int:
        """Free at least `num_bytes` of unpinned blocks if there are so many; returns the bytes freed."""

    def take_back(self) -> None:
        """Drop whatever this process put here, where it still can: some of it is wrong."""
        self.evict(1 << 62)

    @abstractmethod
    def close(self) -> None:
        """flush(), then give back threads and descriptors; idempotent."""
