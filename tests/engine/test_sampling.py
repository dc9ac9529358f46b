"""Sampling: against torch's own distributions, independent of batch mates; stops, n, logprobs, limits."""

import random
from collections import Counter

import pytest
import torch

from hpckv.engine.engine import Engine
from hpckv.engine.request import Request, SamplingParams
from hpckv.engine.sampler import Draw, sample, uniform
from hpckv.errors import CapacityError, ConfigError
from hpckv.kvcache import CacheConfig


def draw(logits, count, **params):
    sampling = SamplingParams(**{"temperature": 1.0, **params})
    return Counter(sample(logits[None], [Draw(sampling, 11, position)])[0].token for position in range(count))


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    found = draw(logits, 4000)
    wanted = logits.softmax(-1) * 4000
    assert all(abs(found[i] - wanted[i]) < 130 for i in range(4))
    hot = draw(logits, 4000, temperature=2.0)
    assert all(abs(hot[i] - ((logits / 2).softmax(-1) * 4000)[i]) < 130 for i in range(4))


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    assert set(draw(logits, 300, top_k=2)) == {0, 3}
    assert set(draw(logits, 300, top_k=1)) == {3}
    assert set(draw(logits, 300, top_p=0.6)) == {3}  # its probability alone is 0.64
    assert set(draw(logits, 300, top_p=0.7)) == {0, 3}


def test_uniform_is_a_function_of_seed_and_position():
    values = [uniform(seed, position) for seed in range(40) for position in range(50)]
    assert len(set(values)) == 2000
    assert abs(sum(values) / 2000 - 0.5) < 0.02
    assert uniform(1, 2) == uniform(1, 2)


def test_greedy_takes_the_first_of_equals_and_logprobs_are_the_models_own():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    (found,) = sample(logits, [Draw(SamplingParams(logprobs=2), 0, 0)])
    entry = found.logprob
    assert found.token == 1
    assert entry.logprob == pytest.approx(float(logits[0].log_softmax(-1)[1]))
    assert {i for i, _ in entry.top} == {1, 2}


@pytest.fixture
def engine(checkpoint):
    return Engine(checkpoint("llama", tokenizer=True), cache=CacheConfig(block_tokens=8, device_memory="8MiB"))


def answers(engine, requests):
    for request in requests:
        engine.add(request)
    found = {}
    while engine.num_unfinished:
        found |= {a.request_id: a for a in engine.step()}
    return found


def test_a_sampled_text_does_not_depend_on_its_batch_mates(engine):
    rng = random.Random(1)
    params = SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, ignore_eos=True)
    requests = [Request(f"r{n}", rng.choices(range(3, 120), k=20 + n), params, n) for n in range(6)]
    alone = {r.request_id: answers(engine, [r])[r.request_id].token_ids for r in requests}
    together = answers(engine, [Request(r.request_id, r.prompt_ids, params, -r.order) for r in requests])
    assert {name: answer.token_ids for name, answer in together.items()} == alone
    assert len({tuple(t) for t in alone.values()}) == 6


def test_seed_decides_and_n_gives_different_texts(engine):
    prompt = list(range(3, 40))
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=3, ignore_eos=True)
    first = answers(engine, [Request("a", prompt, params)])["a"]
    again = answers(engine, [Request("b", prompt, params)])["b"]
    assert [c.token_ids for c in first.completions] == [c.token_ids for c in again.completions]
    assert len({tuple(c.token_ids) for c in first.completions}) == 3
    assert first.usage.prompt_tokens == 37
    assert first.usage.completion_tokens == 36
    assert sum(first.usage.cached.values()) + first.usage.computed_tokens == 37


def test_stop_strings_end_and_are_cut_out_wherever_tokens_split_them(engine):
    prompt = list(range(3, 40))
    whole = answers(engine, [Request("a", prompt, SamplingParams(max_tokens=40, ignore_eos=True))])["a"].text
    assert len(whole) > 12
    stop = whole[5:8]
    cut = answers(engine, [Request("b", prompt, SamplingParams(max_tokens=40, stop=["never", stop], ignore_eos=True))])[
        "b"
    ]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.completions[0].finish_reason == "stop"


def test_stop_tokens_and_length_end(engine):
    prompt = list(range(3, 40))
    ids = answers(engine, [Request("a", prompt, SamplingParams(max_tokens=9, ignore_eos=True))])["a"]
    assert ids.completions[0].finish_reason == "length"
    stop = SamplingParams(max_tokens=9, stop_token_ids=[ids.token_ids[4]], ignore_eos=True)
    cut = answers(engine, [Request("b", prompt, stop)])["b"]
    assert cut.token_ids == ids.token_ids[: ids.token_ids.index(ids.token_ids[4]) + 1]
    assert cut.completions[0].finish_reason == "stop"


def test_an_answer_ends_with_the_context(engine):
    prompt = [5] * 500
    answer = answers(engine, [Request("a", prompt, SamplingParams(max_tokens=400, ignore_eos=True))])["a"]
    assert len(answer.token_ids) == 12
    assert answer.completions[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [([], "empty"), ([5] * 512, "context is 512"), ([400], "outside the vocabulary"), ([-1], "outside")],
)
def test_what_can_never_be_answered_is_refused(engine, prompt, reason):
    with pytest.raises(CapacityError, match=reason):
        engine.add(Request("a", prompt, SamplingParams()))


def test_wrong_parameters_name_themselves():
    with pytest.raises(ConfigError, match=r"top_p: 0.0 is not in"):
        SamplingParams(top_p=0.0)


def test_generate_yields_in_the_order_of_the_prompts(engine):
    prompts = ["zebra", [5, 6, 7], [{"role": "user", "content": "hi"}], "ant"]
    found = list(engine.generate(prompts, SamplingParams(max_tokens=3)))
    assert [a.usage.prompt_tokens for a in found] == [5, 3, len(engine.prompt_ids(prompts[2])), 3]


def test_an_abandoned_or_refused_generate_leaves_the_engine_usable(engine):
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    wanted = [a.token_ids for a in engine.generate([[5, 6], [7, 8]], params)]
    for _ in engine.generate([[5, 6], [7, 8]], params):
        break
    with pytest.raises(CapacityError):
        list(engine.generate([[5, 6], [5] * 600], params))
    assert [a.token_ids for a in engine.generate([[5, 6], [7, 8]], params)] == wanted
    engine.cache.check_integrity(engine.scheduler.running)


def test_requests_of_equal_order_survive_preemption(checkpoint):
    small = Engine(checkpoint("llama"), cache=CacheConfig(block_tokens=8, device_memory="800KiB"))
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    found = answers(small, [Request(str(n), [n + 3] * 30, params) for n in range(6)])
    assert small.scheduler.stats.preemptions > 0
    assert {len(a.token_ids) for a in found.values()} == {40}
