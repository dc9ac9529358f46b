"""The contract of paged attention, and the choice of a backend.

A step runs T packed tokens: chunks of several sequences one after another. For each step the runner calls
`plan()` once; the plan is handed to `attend()` in every layer. A backend

    - may read any page named in a chunk, and reads no other;
    - is called after the chunk's own keys and values were written into their pages;
    - keeps nothing between steps but copies of keys and values, each for the chunk's `owner`.

Shapes: T packed tokens, N heads, K KV heads, H head size, P pages, S slots in a page. Head n reads KV head
n // (N // K).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class SequenceChunk:
    """Consecutive tokens of one sequence in a step, and the pages of everything up to their end."""

    start: int
    """Position of the chunk's first token in its sequence."""
    num_tokens: int
    pages: Sequence[int]
    owner: int = 0
    """Names one admission of a sequence: keys and values at positions that it has passed never change. 0 is nobody's."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True)
class HeadShape:
    """One layer's attention: sizes of this rank's share, and the arithmetic between query and key."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    """A query at position p sees p - window + 1 ... p; None sees everything before it."""

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads


class AttentionPlan(Protocol):
    """What a backend prepared for one step; opaque to everybody else."""


class AttentionBackend(ABC):
    """One way to compute paged attention."""

    @abstractmethod
    def plan(self, chunks: Sequence[SequenceChunk], windows: frozenset[int | None]) -> AttentionPlan:
        """Prepare a step for layers of each of `windows`; rows follow the order of `chunks`."""

    @abstractmethod
    def attend(
        self,
        q_TNH: torch.Tensor,
        keys_XKH: torch.Tensor,
        values_XKH: torch.Tensor,
        plan: AttentionPlan,
        shape: HeadShape,
    ) -> torch.Tensor:
        """Attention of every row over its sequence, (T, N, H) in q's dtype.

        `keys_XKH` and `values_XKH` are a layer's pool with X = P * S slots.
        """


def make_backend(
    numerics: str,
    *,
    block_tokens: int,
    device: torch.device,
    shares_prefixes: bool = True,
    kept_tail_tokens: int = 0,
) -> AttentionBackend:
    """The backend for `numerics` (`fast` or `strict`) on `device`.

    Keys and values of up to `kept_tail_tokens` are kept from one decode step to the next, which pays where consecutive steps
    decode the same sequences.
    """
    if numerics == "strict":
        from hpckv.attention.strict import StrictBackend

        return StrictBackend(block_tokens=block_tokens, device=device)
    from hpckv.attention.sdpa import SdpaBackend

    return SdpaBackend(
        block_tokens=block_tokens, device=device, shares_prefixes=shares_prefixes, kept_tail_tokens=kept_tail_tokens
    )
