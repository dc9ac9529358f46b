"""What tensor-parallel layers ask of each other: the contract, its trivial form for one rank, and the form over a group.

    all_reduce(x)   sum over the tensor ranks; every rank gets the same bits
    all_gather(x)   the ranks' last axes side by side, in rank order

Every rank of a group must call the same operations in the same order with the same shapes. Nothing here
keeps global state: a layer is given its collectives at construction, so that a test can build several
ranks in one process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from hpckv.comm.group import Array, Group, Watch

if TYPE_CHECKING:  # typing only: this package is imported on login nodes
    import torch

_GATHER_BYTES = 256 * 1024
"""Sums of more ranks than two are gathered up to this size, and reduced by the transport's own algorithm beyond it."""


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


class GroupCollectives(Collectives):
    """Over a `Group`, through host memory.

    Partial sums travel in their own dtype and are added in float32, in rank order where `has_fixed_order` or the sum is
    small, so that every rank and every run gets the same bits.
    """

    def __init__(self, group: Group, watch: Watch, *, has_fixed_order: bool = False) -> None:
        self._group, self._watch = group, watch
        self._has_fixed_order = has_fixed_order

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        if self._has_fixed_order or self._group.size == 2 or x.numel() * 4 <= _GATHER_BYTES:
            return add_in_order(self._gather(x)).to(x.device)
        total = x.detach().to("cpu", torch.float32, copy=True).contiguous()
        self._watch.wait(self._group.reduce_sum(total.numpy().reshape(-1)), "the other tensor ranks")
        return total.to(x.device, x.dtype)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.cat(list(self._gather(x)), dim=-1).to(x.device)

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's `x`, (ranks, *x.shape), on the host."""
        import torch

        own = x.detach().cpu().contiguous()
        whole = torch.empty((self._group.size, *own.shape), dtype=own.dtype)
        self._watch.wait(self._group.all_gather(as_bytes(own), as_bytes(whole)), "the other tensor ranks")
        return whole


def add_in_order(parts: torch.Tensor) -> torch.Tensor:
    """The sum over the first axis, one part after another in float32, rounded once to the parts' dtype."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total.to(parts.dtype)


def as_bytes(x: torch.Tensor) -> Array:
    """The memory of a contiguous tensor on the host, not copied; for any dtype, also those that numpy does not have."""
    import torch

    found: Any = x.reshape(-1).view(torch.uint8).numpy()
    array: Array = found
    return array
