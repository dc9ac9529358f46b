"""Ranks and what passes between them."""

from hpckv.comm.collectives import Collectives, SingleRank
from hpckv.comm.parallel_dims import ParallelConfig, ParallelDims

__all__ = ["Collectives", "ParallelConfig", "ParallelDims", "SingleRank"]
