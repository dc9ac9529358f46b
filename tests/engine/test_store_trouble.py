"""A run with any store trouble is a correct run: load failures at every rate, answers those of a run without a store."""

import random

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


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("trouble", ["miss", "slow death"])
def test_load_failures_change_no_answer(checkpoint, tmp_path, rate, trouble):
    folder = checkpoint("llama")
    wanted = tokens(Engine(folder, cache=CACHE))
    config = StoreConfig(shared=str(tmp_path / "kv"), write="all", host_size=0)
    assert tokens(Engine(folder, store=config, cache=CACHE)) == wanted

    engine = Engine(folder, store=config, cache=CACHE)
    (tier,) = engine.store.tiers
    real, rng, calls = tier.get, random.Random(7), [0]

    def failing(key, into):
        calls[0] += 1
        if rng.random() < rate or (trouble == "slow death" and calls[0] > 5):
            into[: len(into) // 2] = b"\xff" * (len(into) // 2)  # what a failed read leaves behind
            return False
        return real(key, into)

    tier.get = failing
    assert tokens(engine) == wanted
    assert calls[0] > 0


def test_a_store_that_vanishes_under_the_run_changes_no_answer(checkpoint, tmp_path):
    folder = checkpoint("llama")
    config = StoreConfig(shared=str(tmp_path / "kv"), write="all", host_size=0)
    wanted = tokens(Engine(folder, store=config, cache=CACHE))
    engine = Engine(folder, store=config, cache=CACHE)
    (tier,) = engine.store.tiers
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
