"""strict: logits are `torch.equal` cold, warm, in any chunks, with any batch mates, in any order."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpckv.engine.config import EngineConfig
from hpckv.engine.engine import Engine
from hpckv.engine.request import Request, SamplingParams
from hpckv.kvcache import CacheConfig
from hpckv.model import ModelSettings
from tests.engine.forward import logits_at_every_position

CASES = {
    "llama": ("llama", {}, "float32"),
    "llama-bf16": ("llama", {}, "bfloat16"),
    "gemma2": ("gemma2", {"sliding_window": 20}, "float32"),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, "float32"),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Recorder:
    """Keeps the logits every sampled position was drawn from."""

    def __init__(self, engine: Engine):
        self.seen: dict[tuple[str, int], torch.Tensor] = {}
        sample, logits = engine.runner.sample, engine.runner.logits
        rows: list[torch.Tensor] = []

        def recording(chunks, x):
            rows.clear()
            found = sample(chunks, x)
            draws = [chunk.draw for chunk in chunks if chunk.draw]
            names = {seq.seed: name for name, state in engine._states.items() for seq in state.sequences}
            for draw, row in zip(draws, rows[0] if rows else (), strict=True):
                self.seen[names[draw.seed], draw.position] = row.clone()
            return found

        def noting(x):
            rows.append(logits(x))
            return rows[-1]

        engine.runner.sample, engine.runner.logits = recording, noting


def make_engine(folder, dtype, device, *, chunk=0, batch=64, memory="8MiB") -> Engine:
    return Engine(
        ModelSettings(path=str(folder), dtype=dtype, device=device),
        cache=CacheConfig(block_tokens=8, device_memory=memory),
        engine=EngineConfig(numerics="strict", chunk_tokens=chunk, max_batch_tokens=batch),
    )


def run(
    engine: Engine, prompts: dict[str, list[int]], order: list[str], *, tokens: int = 6
) -> dict[tuple[str, int], torch.Tensor]:
    recorder = Recorder(engine)
    for place, name in enumerate(order):
        engine.add(Request(name, prompts[name], SamplingParams(max_tokens=tokens, ignore_eos=True), place))
    while engine.num_unfinished:
        engine.step()
    return recorder.seen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_cold_warm_chunked_shuffled_are_equal(case, device, checkpoint):
    family, changes, dtype = CASES[case]
    folder = checkpoint(family, **changes)
    alone: dict[tuple, dict] = {}

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(
        shared=st.sampled_from([0, 5, 8, 40, 61]),
        chunk=st.sampled_from([0, 1, 7, 64]),
        batch=st.sampled_from([64, 97, 300]),
        order=st.permutations(["a", "b", "c", "d"]),
        mates=st.integers(0, 5),
    )
    def check(shared, chunk, batch, order, mates):
        rng = random.Random(shared)
        head = rng.choices(range(3, 120), k=shared)
        prompts = {name: head + rng.choices(range(3, 120), k=n) for name, n in zip("abcd", (3, 9, 26, 1), strict=True)}
        if shared not in alone:  # each by itself, cold, whole
            alone[shared] = {}
            for name in prompts:
                alone[shared] |= run(make_engine(folder, dtype, device, batch=512), prompts, [name])
        engine = make_engine(folder, dtype, device, chunk=chunk, batch=batch)
        for n in range(mates):
            ids = rng.choices(range(3, 120), k=20 + n)
            engine.add(Request(f"mate{n}", ids, SamplingParams(max_tokens=9, ignore_eos=True), n % 3))
        cold = run(engine, prompts, order)
        warm = run(engine, prompts, order)
        for place, logits in alone[shared].items():
            assert torch.equal(cold[place], logits), f"cold {place}"
            assert torch.equal(warm[place], logits), f"warm {place}"

    check()


def test_prompts_beyond_one_split_of_keys_are_equal_too(checkpoint):
    folder = checkpoint("llama")
    rng = random.Random(8)
    head = rng.choices(range(3, 120), k=270)
    prompts = {name: head + rng.choices(range(3, 120), k=n) for name, n in zip("ab", (3, 9), strict=True)}
    alone = {}
    for name in prompts:
        alone |= run(make_engine(folder, "float32", "cpu", batch=512), prompts, [name])
    together = run(make_engine(folder, "float32", "cpu", chunk=50, batch=97), prompts, ["b", "a"])
    assert all(torch.equal(together[place], logits) for place, logits in alone.items())


def test_preemption_and_eviction_change_no_bit(checkpoint):
    folder = checkpoint("llama")
    rng = random.Random(3)
    head = rng.choices(range(3, 120), k=30)
    prompts = {str(n): head + rng.choices(range(3, 120), k=20 + n) for n in range(8)}
    roomy = run(make_engine(folder, "float32", "cpu", batch=256), prompts, list(prompts), tokens=24)
    tight_engine = make_engine(folder, "float32", "cpu", batch=256, memory="800KiB")
    tight = run(tight_engine, prompts, list(prompts), tokens=24)
    assert tight_engine.scheduler.stats.preemptions > 0
    assert tight_engine.cache.pool.num_evicted > 0
    assert all(torch.equal(tight[place], roomy[place]) for place in roomy)


def test_the_store_changes_no_bit(checkpoint, tmp_path):
    folder = checkpoint("llama")
    prompt = random.Random(4).choices(range(3, 120), k=75)
    engines = []
    for _ in range(2):
        engine = make_engine(folder, "float32", "cpu")
        engine = Engine(engine.settings, store=str(tmp_path / "kv"), cache=engine.cache_config, engine=engine.config)
        engine._writes = "all"
        engines.append((run(engine, {"a": prompt}, ["a"]), engine))
        engine.close()
    (cold, _), (warm, second) = engines
    assert second.cache.stats.onboarded["shared"] == 9
    assert all(torch.equal(cold[place], warm[place]) for place in cold)


def test_strict_agrees_with_fast_within_rounding(checkpoint):
    folder = checkpoint("llama")
    prompt = random.Random(5).choices(range(3, 120), k=300)
    strict = make_engine(folder, "float32", "cpu")
    fast = Engine(strict.settings, cache=strict.cache_config)
    difference = logits_at_every_position(strict, prompt, chunk=0) - logits_at_every_position(fast, prompt, chunk=0)
    assert difference.abs().max() < 1e-3
