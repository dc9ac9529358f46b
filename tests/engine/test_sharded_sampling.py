"""Sampling with the vocabulary cut over several ranks: what is drawn is what is drawn from the whole, by the definition."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpckv.comm import Collectives
from hpckv.engine import sampler
from hpckv.engine.request import SamplingParams
from hpckv.engine.sampler import Draw, Sampled, sample, uniform


class Ranks:
    """Ranks of one process: a thread each."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[torch.Tensor] = [torch.empty(0)] * size
        self.gathered: list[int] = []
        """Numbers that one rank gave, per exchange."""


class OfRanks(Collectives):
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank = ranks, rank

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("sampling adds nothing up")

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.ranks.parts[self.rank] = x
        self.ranks.barrier.wait()
        assert {(part.shape, part.dtype) for part in self.ranks.parts} == {(x.shape, x.dtype)}
        whole = torch.cat(self.ranks.parts, dim=-1)
        if self.rank == 0:
            self.ranks.gathered.append(x.numel())
        self.ranks.barrier.wait()
        return whole


def sample_cut(logits: torch.Tensor, draws: list[Draw], cuts: list[int]) -> tuple[list[Sampled], list[int]]:
    """What every rank finds, and how many numbers each gave, exchange by exchange; `cuts` are first tokens of ranks 1, 2, ..."""
    places = [0, *sorted(cuts), logits.shape[1]]
    ranks = Ranks(len(places) - 1)

    def work(rank: int, first: int, end: int) -> list[Sampled]:
        try:
            return sample(logits[:, first:end], draws, first_id=first, collectives=OfRanks(ranks, rank))
        except BaseException:
            ranks.barrier.abort()
            raise

    with ThreadPoolExecutor(len(places) - 1) as threads:
        running = [threads.submit(work, rank, *ends) for rank, ends in enumerate(pairwise(places))]
    errors = [error for each in running if (error := each.exception())]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    found = [each.result() for each in running]
    assert all(other == found[0] for other in found)
    return found[0], ranks.gathered


def defined(logits: torch.Tensor, draw: Draw) -> int:
    """The token by the definition, plainly."""
    params, x = draw.params, logits.double().numpy()
    order = np.lexsort((np.arange(len(x)), -x))
    if params.temperature == 0:
        return int(order[0])
    scaled = (x[order] - x.max()) / max(params.temperature, 1e-6)
    kept = np.exp(scaled)[: params.top_k or None]
    kept /= kept.sum()
    if params.top_p < 1:
        # 1e-7: three times a tenth are 0.3, however they are rounded.
        kept = kept[: np.searchsorted(kept.cumsum(), params.top_p - 1e-7) + 1]
        kept /= kept.sum()
    return int(order[(kept.cumsum() <= uniform(draw.seed, draw.position)).sum()])


def assert_logprobs(found: Sampled, logits: torch.Tensor, draw: Draw) -> None:
    if draw.params.logprobs is None:
        assert found.logprob is None
        return
    wanted = logits.double().log_softmax(-1)
    order = np.lexsort((np.arange(len(wanted)), -logits.numpy()))[: draw.params.logprobs]
    assert found.logprob.token_id == found.token
    assert found.logprob.logprob == pytest.approx(float(wanted[found.token]), abs=1e-9)
    assert [token for token, _ in found.logprob.top] == order.tolist()
    assert [p for _, p in found.logprob.top] == pytest.approx(wanted[order].tolist(), abs=1e-9)


def assert_same(found: Sampled, wanted: Sampled) -> None:
    """To the token, and log-probabilities to 1e-9."""
    assert (found.token, found.is_finite) == (wanted.token, wanted.is_finite)
    assert (found.logprob is None) == (wanted.logprob is None)
    if found.logprob is not None:
        assert found.logprob.logprob == pytest.approx(wanted.logprob.logprob, abs=1e-9)
        assert [token for token, _ in found.logprob.top] == [token for token, _ in wanted.logprob.top]
        assert [p for _, p in found.logprob.top] == pytest.approx([p for _, p in wanted.logprob.top], abs=1e-9)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-9, 0.01, 0.3, 1.0, 1.0, 2.0, 100.0]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.9, 0.999]),
    top_k=st.sampled_from([0, 0, 1, 2, 3, 7, 50, 2**40]),
    logprobs=st.sampled_from([None, None, 0, 1, 3, 20]),
)
DRAW = st.builds(Draw, PARAMS, st.integers(0, 2**64 - 1), st.integers(0, 2**20))
TIED = st.sampled_from([-40.0, -1.0, 0.0, -0.0, 0.5, 0.5, 3.0])
ANY = st.floats(-60, 60, width=32)


@st.composite
def cases(draw):
    """Logits, a draw for every row, and where they are cut: into up to 5 parts, some perhaps empty."""
    size = draw(st.integers(1, 40))
    row = st.lists(draw(st.sampled_from([TIED, ANY])), min_size=size, max_size=size)
    rows = draw(st.lists(row, min_size=1, max_size=4))
    draws = draw(st.lists(DRAW, min_size=len(rows), max_size=len(rows)))
    cuts = draw(st.lists(st.integers(0, size), max_size=4))
    return torch.tensor(rows), draws, cuts


@pytest.mark.parametrize("candidates", [256, 3])  # so many tokens each rank gives at first, at most
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_every_cut_draws_what_the_whole_draws_and_the_definition_says(candidates, case):
    logits, draws, cuts = case
    whole = sample(logits, draws)
    with mock.patch.multiple(sampler, _CANDIDATES=candidates, _MOST_CANDIDATES=candidates):
        found, _ = sample_cut(logits, draws, cuts)
    for row, draw in enumerate(draws):
        assert_same(found[row], whole[row])
        assert found[row].is_finite
        assert found[row].token == defined(logits[row], draw)
        assert_logprobs(found[row], logits[row], draw)


def draws_of(count: int, **params) -> list[Draw]:
    return [Draw(SamplingParams(**params), 11, position) for position in range(count)]


def test_frequencies_of_a_cut_vocabulary_follow_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 2.0])
    found, _ = sample_cut(logits.expand(2000, 5), draws_of(2000, temperature=1.0), [1, 2, 4])
    counts, wanted = Counter(each.token for each in found), logits.softmax(-1) * 2000
    assert all(abs(counts[token] - wanted[token]) < 90 for token in range(5))
    found, _ = sample_cut(logits.expand(2000, 5), draws_of(2000, temperature=2.0, top_k=3, top_p=0.8), [3])
    counts, wanted = Counter(each.token for each in found), (logits / 2).softmax(-1)
    # 0.38 and 0.38 of the three most probable ones reach no 0.8: the third stays.
    wanted = 2000 * wanted / wanted[[0, 3, 4]].sum()
    assert set(counts) == {0, 3, 4}
    assert all(abs(counts[token] - wanted[token]) < 90 for token in (0, 3, 4))


def test_of_equals_the_lowest_id_comes_first_wherever_the_vocabulary_is_cut():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 3.0, 2.0]])
    for cuts in ([], [2], [1, 2, 3, 4], [4, 4, 5]):
        (greedy,), _ = sample_cut(logits, draws_of(1, logprobs=3), cuts)
        assert (greedy.token, [token for token, _ in greedy.logprob.top]) == (1, [1, 2, 3])
        found, _ = sample_cut(logits.expand(200, 6), draws_of(200, temperature=1.0, top_k=2), cuts)
        assert {each.token for each in found} == {1, 2}


def test_a_flat_row_is_gathered_whole_and_no_other():
    peaked = torch.linspace(0, -60, 1500)
    logits = torch.stack([peaked, torch.zeros(1500), peaked, peaked.flip(0)])
    draws = draws_of(4, temperature=1.0, logprobs=2)
    found, gathered = sample_cut(logits, draws, [500, 750])
    assert [each.token for each in found] == [defined(row, draw) for row, draw in zip(logits, draws, strict=True)]
    # The most probable tokens; 256 and one more of every row; how many the largest rank has; the one row whole.
    assert gathered == [4 * 3, 4 * (2 * 257 + 3), 1, 2 * 751 + 3]


def test_a_row_of_ties_is_settled_as_the_whole_one_is():
    """More equals than any rank gives: only the whole row tells which of them are lowest."""
    logits = torch.zeros(200, 2000)
    logits[:, 1000:] = 1.0
    draws = draws_of(200, temperature=0.7, top_p=0.9)
    wanted = [defined(logits[0], draw) for draw in draws]
    assert [each.token for each in sample(logits, draws)] == wanted
    for cuts in ([1500], [100, 999, 1001]):
        found, _ = sample_cut(logits, draws, cuts)
        assert [each.token for each in found] == wanted


def test_a_top_k_beyond_the_vocabulary_costs_no_more_than_the_vocabulary():
    logits = torch.linspace(0, 3, 50).expand(20, 50)
    found, gathered = sample_cut(logits, draws_of(20, temperature=1.0, top_k=10**6), [20])
    plain, _ = sample_cut(logits, draws_of(20, temperature=1.0), [20])
    assert [each.token for each in found] == [each.token for each in plain]
    assert max(gathered) < 20 * 10_000


BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize(
    "params", [{}, {"logprobs": 2}, {"temperature": 1.0}, {"temperature": 0.5, "top_k": 3, "top_p": 0.9}]
)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("cuts", [[], [3], [1, 2, 4, 5]])
def test_a_row_that_is_not_finite_is_said_on_every_rank_and_disturbs_no_other(bad, cuts, params):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 7, generator=generator)
    draws = draws_of(6, **params)
    wanted, _ = sample_cut(logits, draws, cuts)
    logits[1, 4], logits[2, :], logits[4, :3] = bad, bad, bad
    found, _ = sample_cut(logits, draws, cuts)
    assert [each.is_finite for each in found] == [True, False, False, True, False, True]
    assert [found[row] for row in (0, 3, 5)] == [wanted[row] for row in (0, 3, 5)]


@pytest.mark.parametrize("bad", BAD)
def test_a_row_that_is_not_finite_is_said_by_ranks_that_have_no_token_at_all(bad):
    logits = torch.tensor([[bad, bad], [0.0, 1.0]])
    found, _ = sample_cut(logits, draws_of(2, temperature=1.0), [0, 1, 1, 2])
    assert [each.is_finite for each in found] == [False, True]
    assert found[1] == sample(logits[1:], draws_of(2, temperature=1.0)[1:])[0]


def test_infinities_of_both_signs_are_not_finite_either():
    logits = torch.tensor([[float("inf"), 0.0, float("-inf"), 1.0]])
    for cuts in ([], [1], [2], [1, 2, 3]):
        (found,), _ = sample_cut(logits, draws_of(1), cuts)
        assert not found.is_finite


def test_nothing_to_draw_is_nothing():
    assert sample(torch.zeros(0, 5), []) == []
