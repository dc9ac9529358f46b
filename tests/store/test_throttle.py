"""A limited rate is kept, by waiting a little and then by computing."""

import threading
import time

import pytest

from hpckv.errors import ConfigError
from hpckv.quantity import ByteSize
from hpckv.store import StoreConfig
from hpckv.store.host_tier import HostTier
from hpckv.store.throttle import RateLimit, ThrottledTier
from hpckv.testing.tier_suite import GEOMETRY, TierSuite, make_block
from tests.store.shared_store import get, put


class TestThrottledTier(TierSuite):
    def make_tier(self, folder):
        return ThrottledTier(HostTier(GEOMETRY, budget_bytes=64 * GEOMETRY.block_bytes), RateLimit(1e12))


def test_many_threads_together_keep_to_the_rate():
    limit, taken = RateLimit(1e6), []

    def work() -> None:
        for _ in range(10):
            limit.take(10_000)
            taken.append(10_000)

    start = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start >= (sum(taken) - 10_000) / 1e6


def test_what_would_wait_long_is_a_miss_and_takes_nothing():
    tier = ThrottledTier(HostTier(GEOMETRY, budget_bytes=1 << 20), RateLimit(GEOMETRY.block_bytes / 30))
    tier.put(make_block(1))
    assert tier.get(make_block(1).key) is not None
    start = time.monotonic()
    assert [tier.get(make_block(1).key) for _ in range(5)] == [None] * 5
    assert time.monotonic() - start < 10
    assert tier.stats.misses == {"throttled": 5}


def test_a_throttled_store_serves_the_same(tmp_path):
    rates = {"read_rate": ByteSize(10**9), "write_rate": ByteSize(10**9)}
    put(tmp_path / "kv", range(5), **rates)
    assert get(tmp_path / "kv", range(6), **rates) == [True] * 5 + [False]


def test_no_rate_at_all_is_refused():
    with pytest.raises(ConfigError):
        StoreConfig(shared="x", read_rate=ByteSize(0))
