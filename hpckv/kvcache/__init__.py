"""KV cache on the device: pages, prefix match, single flight, and the way to the store."""

from hpckv.kvcache.cache_manager import CacheManager, CacheStats
from hpckv.kvcache.cached_sequence import HIT_TIERS, CachedSequence
from hpckv.kvcache.config import CacheConfig
from hpckv.kvcache.page_pool import PagePool

__all__ = ["HIT_TIERS", "CacheConfig", "CacheManager", "CacheStats", "CachedSequence", "PagePool"]
