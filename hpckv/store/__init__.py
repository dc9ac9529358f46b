"""Tiers of immutable KV blocks keyed by prefix. Bytes, not tensors: never torch.

Importing this package imports nothing else: the names below are resolved on first use, so that who only looks at a store's files
does not wait for numpy and h5py.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpckv.store.block import ROOT_KEY, BlockGeometry, block_key, prefix_keys
    from hpckv.store.config import StoreConfig
    from hpckv.store.identity import Identity, Namespace, weights_digest
    from hpckv.store.opening import open_store
    from hpckv.store.tier import PutOutcome, Tier, TierStats
    from hpckv.store.tiered_store import TieredStore

__all__ = [
    "ROOT_KEY",
    "BlockGeometry",
    "Identity",
    "Namespace",
    "PutOutcome",
    "StoreConfig",
    "Tier",
    "TierStats",
    "TieredStore",
    "block_key",
    "open_store",
    "prefix_keys",
    "weights_digest",
]

_HOMES = {
    "block": ("ROOT_KEY", "BlockGeometry", "block_key", "prefix_keys"),
    "config": ("StoreConfig",),
    "identity": ("Identity", "Namespace", "weights_digest"),
    "opening": ("open_store",),
    "tier": ("PutOutcome", "Tier", "TierStats"),
    "tiered_store": ("TieredStore",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
