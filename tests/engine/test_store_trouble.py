"""A run with any store trouble is a correct run: load failures at every rate, answers those of a run without a store."""

import random
import threading
import time

import pytest

from hpckv.engine.engine import Engine
from hpckv.engine.request import SamplingParams
from hpckv.kvcache import CacheConfig
from hpckv.store import StoreConfig

CACHE = CacheConfig(block_tokens=8, device_memory="1MiB")
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def prompts() -> list[list[int]]:
    rng = random.Random(6)
    heads = [rng.choices(range(3, 120), k=n) for n in (64, 45)]
    return [head + rng.choices(range(3, 120), k=12) for head in heads for _ in range(5)]


def tokens(engine: Engine) -> list[list[int]]:
    found = [answer.token_ids for answer in engine.generate(prompts(), PARAMS)]
    engine.cache.check_integrity(engine.scheduler.running)
    engine.close()
    return found


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("trouble", ["miss", "slow death", "raises"])
def test_load_failures_change_no_answer(checkpoint, tmp_path, rate, trouble):
    folder = checkpoint("llama")
    wanted = tokens(Engine(folder, cache=CACHE))
    config = StoreConfig(shared=str(tmp_path / "kv"), write="all", host_size=0)
    assert tokens(Engine(folder, store=config, cache=CACHE)) == wanted

    engine = Engine(folder, store=config, cache=CACHE)
    tier, *_ = engine.store.tiers  # after it come bridges
    real, rng, calls = tier.get, random.Random(7), [0]

    def failing(key):
        calls[0] += 1
        if trouble == "raises" and rng.random() < rate:
            raise OSError(5, "Input/output error")
        if rng.random() < rate or (trouble == "slow death" and calls[0] > 5):
            return None
        return real(key)

    tier.get = failing
    assert tokens(engine) == wanted
    assert calls[0] > 0


def test_a_hanging_store_costs_its_deadline_and_then_nothing(checkpoint, tmp_path):
    folder = checkpoint("llama")
    config = StoreConfig(shared=str(tmp_path / "kv"), write="all", host_size=0)
    wanted = tokens(Engine(folder, store=config, cache=CACHE))
    config = StoreConfig(shared=str(tmp_path / "kv"), write="all", host_size=0, deadline_s=0.3)
    engine = Engine(folder, store=config, cache=CACHE)
    engine.load()
    tier, *_ = engine.store.tiers  # after it come bridges
    release = threading.Event()
    tier.get = lambda key: release.wait() and None
    found = [answer.token_ids for answer in engine.generate(prompts(), PARAMS)]
    release.set()
    assert found == wanted
    # Not one deadline a request: reads ahead wait together, and then the breaker is open.
    assert 3 <= tier.stats.misses["timeout"] <= 16
    assert engine.store.breakers[0].num_trips == 1
    assert engine.store.match([b"k" * 32]) == 0
    engine.close()


def test_loading_overlaps_and_a_prefix_is_read_once(checkpoint, tmp_path):
    folder = checkpoint("llama")
    config = StoreConfig(shared=str(tmp_path / "kv"), write="all", host_size=0)
    wanted = tokens(Engine(folder, store=config, cache=CACHE))
    engine = Engine(folder, store=config, cache=CACHE)
    tier, *_ = engine.store.tiers  # after it come bridges
    real, keys = tier.get, []

    def slow(key):
        keys.append(key)
        time.sleep(0.005)
        return real(key)

    tier.get = slow
    assert tokens(engine) == wanted
    assert len(keys) == len(set(keys))
    assert engine.cache.stats.onboarded["shared"] == len(keys)
    assert engine.scheduler.stats.prefill_tokens < 10 * 12 + 2 * 8


def test_what_is_slower_to_load_is_computed(checkpoint, tmp_path):
    folder = checkpoint("llama")
    config = StoreConfig(shared=str(tmp_path / "kv"), write="all", host_size=0)
    wanted = tokens(Engine(folder, store=config, cache=CACHE))
    engine = Engine(folder, store=config, cache=CACHE)
    engine.load_policy.load_bytes_per_s, engine.load_policy.prefill_tokens_per_s = 1.0, 1e9
    assert tokens(engine) == wanted
    assert engine.cache.stats.onboarded == {}
    assert engine.load_policy.num_recomputes > 0


def test_a_store_that_vanishes_under_the_run_changes_no_answer(checkpoint, tmp_path):
    folder = checkpoint("llama")
    config = StoreConfig(shared=str(tmp_path / "kv"), write="all", host_size=0)
    wanted = tokens(Engine(folder, store=config, cache=CACHE))
    engine = Engine(folder, store=config, cache=CACHE)
    tier, *_ = engine.store.tiers  # after it come bridges
    for segment in (tmp_path / "kv").glob("u/*/seg/*/*.h5"):
        tier._forget_file(segment)  # an open descriptor would go on reading, rightly
        segment.unlink()
    assert tokens(engine) == wanted
    assert engine.cache.stats.onboarded == {}
    assert tier.stats.misses["gone"] > 0


def test_planned_keeps_only_what_is_wanted_again(checkpoint, tmp_path):
    folder = checkpoint("llama")
    counts = {}
    for policy in ("all", "planned", "off"):
        config = StoreConfig(shared=str(tmp_path / policy), write=policy, host_size=0)
        engine = Engine(folder, store=config, cache=CACHE)
        tokens(engine)
        counts[policy] = engine.store.tiers[0].stats.stored
    assert counts["off"] == 0
    assert counts["planned"] == 64 // 8 + 45 // 8
    assert counts["all"] > counts["planned"]


def test_a_read_only_store_is_read(checkpoint, tmp_path):
    folder = checkpoint("llama")
    config = StoreConfig(shared=str(tmp_path / "kv"), write="all")
    tokens(Engine(folder, store=config, cache=CACHE))
    files = sorted((tmp_path / "kv").rglob("*.h5"))
    reader = Engine(folder, store=StoreConfig(shared=str(tmp_path / "kv"), write="off"), cache=CACHE)
    tokens(reader)
    assert reader.cache.stats.onboarded["shared"] > 0
    assert sorted((tmp_path / "kv").rglob("*.h5")) == files


def test_another_models_blocks_are_never_found(checkpoint, tmp_path):
    config = StoreConfig(shared=str(tmp_path / "kv"), write="all")
    tokens(Engine(checkpoint("llama"), store=config, cache=CACHE))
    other = Engine(checkpoint("llama", seed=1), store=config, cache=CACHE)
    wanted = tokens(Engine(checkpoint("llama", seed=1), cache=CACHE))
    assert tokens(other) == wanted
    assert other.cache.stats.onboarded == {}
