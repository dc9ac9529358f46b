"""Blocks in this process's memory: a budget, least recently used first out. Nothing survives the process."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from hpckv.store.block import BlockGeometry
from hpckv.store.segment import StoredBlock
from hpckv.store.tier import PutOutcome, Tier, TierStats


class HostTier(Tier):
    """Host RAM. Evicts on its own to stay within `budget_bytes`; a pinned block stays."""

    survives_process = False

    def __init__(self, geometry: BlockGeometry, *, budget_bytes: int, name: str = "host") -> None:
        self.name = name
        self.geometry = geometry
        self.stats = TierStats()
        self._capacity = budget_bytes // geometry.block_bytes
        self._blocks: OrderedDict[bytes, memoryview] = OrderedDict()
        self._pins: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    def present(self, keys: Sequence[bytes]) -> np.ndarray:
        with self._lock:
            return np.fromiter((key in self._blocks for key in keys), bool, len(keys))

    def get(self, key: bytes) -> memoryview | None:
        start = time.perf_counter()
        with self._lock:
            payload = self._blocks.get(key)
            if payload is not None:
                self._blocks.move_to_end(key)
        if payload is None:
            self.stats.count_miss("absent")
            return None
        self.stats.count_hit(len(payload), time.perf_counter() - start)
        return payload

    def put(self, block: StoredBlock, *, keeps_payload: bool = False) -> PutOutcome:
        payload = memoryview(block.payload if keeps_payload else bytes(block.payload)).cast("B")
        assert len(payload) == self.geometry.block_bytes
        with self._lock:
            if block.key in self._blocks:
                self._blocks.move_to_end(block.key)
                return PutOutcome.DUPLICATE
            while len(self._blocks) >= self._capacity:
                if not self._evict_one():
                    self.stats.dropped += 1
                    return PutOutcome.DROPPED
            self._blocks[block.key] = payload
            self.stats.stored += 1
            self.stats.written_bytes += len(payload)
        return PutOutcome.STORED

    def flush(self) -> None:
        pass

    def pin(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            self._pins.update(k for k in keys if k in self._blocks)

    def unpin(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            for key in keys:
                self._pins[key] -= 1
                if self._pins[key] <= 0:
                    del self._pins[key]

    def evict(self, num_bytes: int) -> int:
        freed = 0
        with self._lock:
            while freed < num_bytes and self._evict_one():
                freed += self.geometry.block_bytes
        return freed

    def close(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._pins.clear()

    def _evict_one(self) -> bool:
        victim = next((k for k in self._blocks if k not in self._pins), None)
        if victim is None:
            return False
        del self._blocks[victim]
        return True
