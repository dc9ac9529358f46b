"""Keeping to a rate: a site's filesystem is everybody's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

import numpy as np

from hpckv.store.segment import StoredBlock
from hpckv.store.tier import PutOutcome, Tier

_MAX_WAIT_S = 1.0
"""A read that would have to wait longer is a miss: computing is the better use of the time."""


class RateLimit:
    """At most so many bytes a second on average, over all threads of this process."""

    def __init__(self, bytes_per_s: float) -> None:
        assert bytes_per_s > 0
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, num_bytes: int, *, max_wait_s: float = float("inf")) -> bool:
        """Wait until `num_bytes` may go; False, at once and without taking any, if that were after `max_wait_s`."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._free_at)
            if start - now > max_wait_s:
                return False
            self._free_at = start + num_bytes / self.bytes_per_s
        time.sleep(start - now)
        return True


class ThrottledTier(Tier):
    """Another tier, read at a limited rate."""

    def __init__(self, tier: Tier, limit: RateLimit) -> None:
        self.name, self.geometry, self.stats = tier.name, tier.geometry, tier.stats
        self.survives_process, self.keeps_copies_only, self.is_bridge = (
            tier.survives_process,
            tier.keeps_copies_only,
            tier.is_bridge,
        )
        self._tier, self._limit = tier, limit

    @property
    def label(self) -> str:
        return self._tier.label

    def present(self, keys: Sequence[bytes]) -> np.ndarray:
        return self._tier.present(keys)

    def get(self, key: bytes) -> memoryview | None:
        if not self._limit.take(self.geometry.block_bytes, max_wait_s=_MAX_WAIT_S):
            self.stats.count_miss("throttled")
            return None
        return self._tier.get(key)

    def writer(self, key: bytes) -> int | None:
        return self._tier.writer(key)

    def put(self, block: StoredBlock, *, keeps_payload: bool = False) -> PutOutcome:
        return self._tier.put(block, keeps_payload=keeps_payload)

    def flush(self) -> None:
        self._tier.flush()

    def pin(self, keys: Iterable[bytes]) -> None:
        self._tier.pin(keys)

    def unpin(self, keys: Iterable[bytes]) -> None:
        self._tier.unpin(keys)

    def evict(self, num_bytes: int) -> int:
        return self._tier.evict(num_bytes)

    def take_back(self) -> None:
        self._tier.take_back()

    def close(self) -> None:
        self._tier.close()
