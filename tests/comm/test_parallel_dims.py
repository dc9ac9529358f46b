"""Ranks and shares: every column, head and layer belongs to exactly one rank of a replica."""

import pytest

from hpckv.comm import ParallelDims
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
    with pytest.raises(ConfigError, match="no multiple"):
        ParallelDims(tp=3).kv_heads(2)
    with pytest.raises(ConfigError, match="3 stages for 2 layers"):
        ParallelDims(pp=3).layers(2)
