"""Blocks that the same model left in another dtype, converted on their way in.

Keys depend on identity and tokens only, so a sibling representation holds the same prefixes under the same keys. What
comes over a bridge is counted apart, goes to no disk, and neither does what is computed after it (`docs/store-format.md`, 9).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from hpckv.store.block import BlockGeometry
from hpckv.store.identity import Namespace
from hpckv.store.policy import Bridging
from hpckv.store.segment import StoredBlock
from hpckv.store.tier import PutOutcome, Tier, TierStats

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_EXACT = {("bfloat16", "float16"), ("bfloat16", "float32"), ("float16", "float32")}
"""(from, to) whose values stay what they are; bfloat16 to float16 up to its overflow and within 2**-25 below 2**-14."""


def sources(dtype: str, allowed: Bridging) -> list[str]:
    """The dtypes that may be read for a run in `dtype`."""
    if allowed == "off" or dtype not in _ITEM_BYTES:
        return []
    return [name for name in _ITEM_BYTES if name != dtype and (allowed == "any" or (name, dtype) in _EXACT)]


def sibling(namespace: Namespace, geometry: BlockGeometry, dtype: str) -> tuple[Namespace, BlockGeometry]:
    """The same identity's namespace and blocks in another dtype."""
    representation: Mapping[str, object] = {**namespace.representation, "dtype": dtype}
    return Namespace(namespace.identity, representation), replace(geometry, item_bytes=_ITEM_BYTES[dtype])


def to_float32(payload: memoryview, dtype: str) -> np.ndarray:
    """The values of a block in `dtype`: (n,) float32."""
    if dtype == "bfloat16":
        return (np.frombuffer(payload, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(payload, "<f4" if dtype == "float32" else "<f2").astype("<f4", copy=False)


def convert(payload: memoryview, source: str, target: str) -> memoryview | None:
    """The same values in another dtype, rounded to nearest even; None if one of them does not fit or is not finite."""
    values = to_float32(payload, source)
    with np.errstate(over="ignore"):
        if target == "bfloat16":
            bits = values.view("<u4")
            found = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
            is_finite = np.isfinite(values).all() and bool(((found & 0x7F80) != 0x7F80).all())
        else:
            found = values.astype("<f4" if target == "float32" else "<f2")
            is_finite = bool(np.isfinite(found).all())
    return memoryview(found.view(np.uint8).data) if is_finite else None


class BridgeTier(Tier):
    """Another dtype's tier, read in this run's. Nothing is ever put into it."""

    survives_process = True
    keeps_copies_only = True
    is_bridge = True

    def __init__(self, tier: Tier, geometry: BlockGeometry, *, source: str, target: str) -> None:
        """`tier` holds blocks in dtype `source`; `geometry` is that of the blocks given out, in dtype `target`."""
        self.name, self.geometry = tier.name, geometry
        self.stats = TierStats()
        self._tier, self._source, self._target = tier, source, target

    @property
    def label(self) -> str:
        return f"{self.name} from {self._source}"

    def present(self, keys: Sequence[bytes]) -> np.ndarray:
        return self._tier.present(keys)

    def get(self, key: bytes) -> memoryview | None:
        start = time.perf_counter()
        found = self._tier.get(key)
        if found is None:
            self.stats.count_miss("absent")
            return None
        converted = convert(found, self._source, self._target)
        if converted is None:
            self.stats.count_miss("overflow")
            return None
        self.stats.count_hit(len(found), time.perf_counter() - start)
        return converted

    def writer(self, key: bytes) -> int | None:
        return self._tier.writer(key)

    def put(self, block: StoredBlock, *, keeps_payload: bool = False) -> PutOutcome:
        return PutOutcome.DROPPED

    def flush(self) -> None:
        pass

    def pin(self, keys: Iterable[bytes]) -> None:
        self._tier.pin(keys)

    def unpin(self, keys: Iterable[bytes]) -> None:
        self._tier.unpin(keys)

    def evict(self, num_bytes: int) -> int:
        return 0

    def take_back(self) -> None:
        pass

    def close(self) -> None:
        self._tier.close()
