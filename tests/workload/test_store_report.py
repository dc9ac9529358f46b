"""A run says what it had from the store, what it computed all the same, and why."""

import random

from hpckv.engine.engine import Engine
from hpckv.engine.request import SamplingParams
from hpckv.kvcache import CacheConfig
from hpckv.store import StoreConfig
from hpckv.workload.summary import describe_store, engine_record

CACHE = CacheConfig(block_tokens=8, device_memory="1MiB")


def run(folder, store, *, prepare=lambda engine: None) -> str:
    config = store and StoreConfig(shared=str(store), write="all", host_size=0)
    engine = Engine(folder, store=config, cache=CACHE)
    engine.load()
    prepare(engine)
    rng = random.Random(6)
    prompts = [rng.choices(range(3, 120), k=64) for _ in range(3)]
    list(engine.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True)))
    engine.close()
    return "\n".join(describe_store([engine_record(engine)]))


def test_what_was_kept_loaded_recomputed_and_missed_is_said(checkpoint, tmp_path):
    folder, store = checkpoint("llama"), tmp_path / "kv"
    assert run(folder, None) == ""
    assert "192 tokens kept for later runs" in run(folder, store)
    assert "192 from shared tokens loaded" in run(folder, store)

    def slow(engine: Engine) -> None:
        engine.load_policy.load_bytes_per_s, engine.load_policy.prefill_tokens_per_s = 1.0, 1e9

    assert "192 stored tokens in 3 prefixes computed again" in run(folder, store, prepare=slow)

    def vanish(_: Engine) -> None:
        for segment in store.rglob("*.h5"):
            segment.unlink()

    missed = run(folder, store, prepare=vanish)
    assert "collected meanwhile" in missed
