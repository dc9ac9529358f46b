"""What tensor-parallel layers ask of each other: the contract, and its trivial form for one rank.

    all_reduce(x)   sum over the tensor ranks, in place where possible; every rank gets the same bits
    all_gather(x)   concatenate the ranks' last axes in rank order

Every rank of a group must call the same operations in the same order with the same shapes. Nothing here
keeps global state: a layer is given its collectives at construction, so that a test can build several
ranks in one process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # typing only: this package is imported on login nodes
    import torch


class Collectives(ABC):
    """One tensor-parallel group as a layer sees it."""

    @abstractmethod
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of every rank's `x` (any shape, equal on all ranks)."""

    @abstractmethod
    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's `x` side by side along the last axis, in rank order."""


class SingleRank(Collectives):
    """A group of one: both operations return their argument."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x
