"""Tiers of immutable KV blocks keyed by prefix. Bytes, not tensors: never torch."""

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
