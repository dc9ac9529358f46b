"""Ranks and what passes between them."""

from hpckv.comm.collectives import Collectives, GroupCollectives, SingleRank
from hpckv.comm.group import Group, RankLostError, Watch
from hpckv.comm.parallel_dims import ParallelConfig, ParallelDims
from hpckv.comm.world import World, enter

__all__ = [
    "Collectives",
    "Group",
    "GroupCollectives",
    "ParallelConfig",
    "ParallelDims",
    "RankLostError",
    "SingleRank",
    "Watch",
    "World",
    "enter",
]
