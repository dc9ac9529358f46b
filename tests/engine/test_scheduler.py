"""The scheduler without a model: single flight, the prefill bound, preemption, budgets. A made-up model 'computes' instantly."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpckv.engine.config import EngineConfig
from hpckv.engine.request import Request, RunningSequence, SamplingParams
from hpckv.engine.scheduler import Scheduler
from hpckv.kvcache import CacheManager
from hpckv.store.block import ROOT_KEY, block_key, prefix_keys
from hpckv.workload.plan import PlannedPrompt, most_tokens_in_use, plan_run

SIZE = 4
EPOCH, IDENTITY = bytes(32), bytes(32)


def keys_of(tokens):
    return prefix_keys(EPOCH, IDENTITY, tokens, SIZE)


class Simulation:
    """Runs prompts to the end; the next token is a function of all tokens before it, as in a model."""

    def __init__(self, prompts, *, pages, outputs=5, **config):
        self.prompts = [PlannedPrompt(p, keys_of(p)) for p in prompts]
        self.plan = plan_run(self.prompts, SIZE)
        self.cache = CacheManager(
            pages + 2, SIZE, lambda parent, tokens: block_key(EPOCH, IDENTITY, parent or ROOT_KEY, tokens)
        )
        self.config = EngineConfig(**{"max_batch_tokens": 64, **config})
        self.scheduler = Scheduler(self.config, self.cache)
        self.outputs = outputs
        self.texts: dict[int, list[int]] = {}
        self.computed_blocks: list[bytes] = []
        for order, number in enumerate(self.plan.order):
            prompt = self.prompts[number]
            request = Request(str(number), prompt.token_ids, SamplingParams(max_tokens=outputs), order)
            self.cache.expect(prompt.keys)
            self.scheduler.add(RunningSequence(request, 0, list(prompt.keys), 0))

    def run(self):
        steps = 0
        while self.scheduler.num_unfinished:
            steps += 1
            assert steps < 10_000, "the scheduler does not come to an end"
            plan = self.scheduler.next_step()
            assert plan.chunks
            assert plan.num_tokens == sum(c.num_tokens for c in plan.chunks) <= self.config.max_batch_tokens
            assert len({c.seq for c in plan.chunks}) == len(plan.chunks) <= self.config.max_requests
            self._compute(plan)
            self.cache.check_integrity(self.scheduler.running)
        return self

    def _compute(self, plan):
        for chunk in plan.chunks:
            assert chunk.start == chunk.seq.num_computed
            assert chunk.end <= len(chunk.seq.pages) * SIZE
            done = [k for n, k in enumerate(keys_of(chunk.seq.tokens)) if chunk.start < (n + 1) * SIZE <= chunk.end]
            self.computed_blocks += done
        self.scheduler.complete(plan)
        for chunk in plan.chunks:
            if not chunk.samples:
                continue
            seq = chunk.seq
            seq.tokens.append(hash(tuple(seq.tokens)) % 50)
            if seq.num_output_tokens == self.outputs:
                self.texts[int(seq.request.request_id)] = seq.output_ids
                self.scheduler.finish(seq)


def tree_of_prompts(seed, *, heads=3, documents=4, questions=5):
    rng = random.Random(seed)

    def draw(low, high):
        return rng.choices(range(50), k=rng.randint(low, high))

    prompts = []
    for _ in range(heads):
        head = draw(8, 30)
        for _ in range(documents):
            document = head + draw(5, 40)
            prompts += [document + draw(1, 9) for _ in range(questions)]
    rng.shuffle(prompts)
    return prompts


def all_pages(prompts, outputs=5):
    planned = [PlannedPrompt(p, keys_of(p)) for p in prompts]
    return most_tokens_in_use(planned, [outputs] * len(prompts), SIZE) // SIZE


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("chunk", [0, 1, 7])
def test_with_enough_memory_prefill_equals_the_lower_bound_of_the_prefix_tree(seed, chunk):
    prompts = tree_of_prompts(seed)
    done = Simulation(prompts, pages=all_pages(prompts), chunk_tokens=chunk).run()
    assert done.scheduler.stats.prefill_tokens == done.plan.least_prefill_tokens
    assert done.scheduler.stats.preemptions == 0
    assert len(done.texts) == len(prompts)


@pytest.mark.parametrize("seed", range(5))
def test_with_a_quarter_of_the_memory_prefill_stays_within_5_percent_of_it(seed):
    prompts = tree_of_prompts(seed, heads=6, documents=6)
    done = Simulation(prompts, pages=all_pages(prompts) // 4, max_requests=16).run()
    stats = done.scheduler.stats
    assert stats.prefill_tokens + stats.recomputed_tokens <= 1.05 * done.plan.least_prefill_tokens
    assert done.cache.pool.num_evicted > 0


def test_no_block_is_computed_twice_in_one_batch():
    prompts = tree_of_prompts(9)
    done = Simulation(prompts, pages=all_pages(prompts), max_batch_tokens=1000).run()
    in_prompts = [k for k in done.computed_blocks if k in {k for p in done.prompts for k in p.keys}]
    assert len(in_prompts) == len(set(in_prompts))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pages=st.integers(24, 60),
    chunk=st.sampled_from([0, 1, 3, 17]),
    requests=st.integers(1, 12),
)
def test_texts_do_not_depend_on_memory_chunks_or_batch_size(seed, pages, chunk, requests):
    prompts = tree_of_prompts(seed, heads=2, documents=2, questions=3)
    roomy = Simulation(prompts, pages=2000).run()
    tight = Simulation(prompts, pages=pages, chunk_tokens=chunk, max_requests=requests).run()
    assert tight.texts == roomy.texts


def test_preemption_takes_the_last_in_plan_order_and_everybody_finishes():
    prompts = [[n] * 30 for n in range(6)]
    done = Simulation(prompts, pages=20, outputs=20).run()
    assert done.scheduler.stats.preemptions > 0
    assert sorted(done.texts) == list(range(6))
    assert done.scheduler.stats.prefill_tokens == 180


def test_a_request_waits_for_a_block_in_flight_and_takes_over_if_its_owner_is_gone():
    head = list(range(16))
    sim = Simulation([[*head, 60, 61], [*head, 70, 71]], pages=40, max_batch_tokens=8)
    plan = sim.scheduler.next_step()
    assert [c.seq.request.request_id for c in plan.chunks] == ["0"]
    sim._compute(plan)
    assert len(sim.scheduler.next_step().chunks) == 1
    (owner,) = sim.scheduler.running
    sim.scheduler.finish(owner)
    plan = sim.scheduler.next_step()
    assert [c.seq.request.request_id for c in plan.chunks] == ["1"]
    assert plan.chunks[0].start == 8


def test_identical_prompts_of_whole_blocks_compute_one_token_each_after_the_first():
    done = Simulation([list(range(16))] * 4, pages=60).run()
    assert done.scheduler.stats.prefill_tokens == done.plan.least_prefill_tokens == 16 + 3
    assert len({tuple(t) for t in done.texts.values()}) == 1


def test_dropping_unstarted_work_leaves_running_work():
    sim = Simulation([[n] * 20 for n in range(5)], pages=100, max_batch_tokens=40)
    sim._compute(sim.scheduler.next_step())
    assert len(sim.scheduler.drop_unstarted()) == 3
    assert sim.scheduler.num_unfinished == 2
