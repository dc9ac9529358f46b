"""Ranks and shares: every column, head and layer belongs to exactly one rank of a replica."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpckv.comm import ParallelDims
from hpckv.comm.parallel_dims import balanced_stages
from hpckv.errors import ConfigError


def test_world_ranks_and_coordinates_are_one_to_one():
    grid = [ParallelDims.of_world_rank(r, tp=3, pp=2) for r in range(12)]
    assert [d.world_rank for d in grid] == list(range(12))
    assert (grid[7].replica, grid[7].pp_rank, grid[7].tp_rank) == (1, 0, 1)


@pytest.mark.parametrize(("layers", "pp"), [(5, 1), (5, 2), (7, 3), (4, 4)])
def test_stages_are_contiguous_and_cover_all_layers(layers, pp):
    stages = [ParallelDims(pp=pp, pp_rank=r).layers(layers) for r in range(pp)]
    assert [n for stage in stages for n in stage] == list(range(layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


def test_what_does_not_divide_is_said():
    with pytest.raises(ConfigError, match="does not divide the model's number of heads"):
        ParallelDims(tp=4).columns(6, "number of heads")
    with pytest.raises(ConfigError, match="3 stages for 2 layers"):
        ParallelDims(pp=3).layers(2)


def shares(tp, heads, kv):
    return [ParallelDims(tp=tp, tp_rank=rank).heads(heads, kv) for rank in range(tp)]


def test_more_ranks_than_kv_heads_replicate_them_and_the_lowest_writes():
    found = shares(4, 8, 2)
    assert [share.kv for share in found] == [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]
    assert [share.owned_kv for share in found] == [slice(0, 1), slice(1, 1), slice(1, 2), slice(2, 2)]


def test_groups_that_are_cut_are_padded():
    first, second = shares(2, 6, 3)
    assert (first.queries, first.kv, first.group_size) == ((0, 1, 2, -1), slice(0, 2), 2)
    assert (second.queries, second.kv, second.owned_kv) == ((3, -1, 4, 5), slice(1, 3), slice(2, 3))


@given(tp=st.integers(1, 8), kv=st.integers(1, 8), group=st.integers(1, 8))
def test_every_query_head_is_computed_once_and_every_kv_head_written_once(tp, kv, group):
    heads = kv * group
    if heads % tp:
        return
    found = shares(tp, heads, kv)
    assert sorted(q for share in found for q in share.queries if q >= 0) == list(range(heads))
    assert [h for share in found for h in range(*share.owned_kv.indices(kv))] == list(range(kv))
    for share in found:
        held = range(share.kv.start, share.kv.stop)
        pairs = zip(share.queries, (h for h in held for _ in range(share.group_size)), strict=True)
        assert all(q // group == h for q, h in pairs if q >= 0)


@given(layers=st.integers(1, 40), pp=st.integers(1, 8), first=st.floats(0, 5), last=st.floats(0, 5))
def test_no_cut_of_the_layers_is_faster_than_the_balanced_one(layers, pp, first, last):
    if pp > layers:
        return
    ends = balanced_stages(layers, pp, first=first, last=last)

    def slowest(cut):
        counts = [b - a for a, b in itertools.pairwise((0, *cut))]
        assert min(counts) >= 1
        counts[0] += first
        counts[-1] += last
        return max(counts)

    if pp <= 3:
        best = min(slowest((*cut, layers)) for cut in itertools.combinations(range(1, layers), pp - 1))
        assert slowest(ends) <= best + 1e-6
    stages = [ParallelDims(pp=pp, pp_rank=rank, stage_ends=ends).layers(layers) for rank in range(pp)]
    assert [n for stage in stages for n in stage] == list(range(layers))
