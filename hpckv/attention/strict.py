"""The strict backend: every row's result is bit-for-bit the same whatever else is in the step.

What could differ is the shape of a kernel call and the order of a sum, so both are fixed:

    - queries go in tiles of `TILE` positions aligned to multiples of TILE *in their sequence*: a position has
      the same row of the same matrix whether its neighbours are computed beside it, earlier, or read from the store;
    - keys go in splits of `SPLIT` positions aligned the same way, padded to full size, always read from the pages;
    - splits are merged one after another from position 0, in fp32.

The runner cuts a step into micro-steps of a fixed number of rows, so the linear layers keep their shape too.

Shapes: N heads, K KV heads, G = N / K, H head size, I (tile, split) pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hpckv.attention.backend import AttentionBackend, AttentionPlan, HeadShape, SequenceChunk

TILE = 8
SPLIT = 256


@dataclass(frozen=True)
class StrictPlan:
    """All tiles of a step. A tile's pairs stand in order of their split; pair -> tile, split, and its key slots."""

    rows: torch.Tensor
    """(T,) where row t stands in the tiles: tile * TILE + position % TILE."""
    num_tiles: int
    query_position: torch.Tensor
    """(tiles, TILE) absolute positions."""
    splits: tuple[tuple[torch.Tensor, torch.Tensor, int], ...]
    """For the first, second, ... split: (tiles that have it, their key slots (tiles, SPLIT), first position)."""


class StrictBackend(AttentionBackend):
    """Reproducibility first: cold = warm = any chunk = any batch mates, `torch.equal`."""

    def __init__(self, *, block_tokens: int, device: torch.device) -> None:
        self.block_tokens = block_tokens
        self.device = device

    def plan(self, chunks: Sequence[SequenceChunk], windows: frozenset[int | None]) -> StrictPlan:
        rows: list[int] = []
        tile_first: list[int] = []
        tile_slots: list[torch.Tensor] = []
        tile_last: list[int] = []
        for chunk in chunks:
            slots = self._padded_slots(chunk)
            for tile in range(chunk.start // TILE, -(-chunk.end // TILE)):
                low, high = max(chunk.start, tile * TILE), min(chunk.end, (tile + 1) * TILE)
                rows += [len(tile_first) * TILE + p % TILE for p in range(low, high)]
                tile_first.append(tile * TILE)
                tile_last.append(high - 1)
                tile_slots.append(slots)
        splits = []
        for first in range(0, max(tile_last) + 1, SPLIT):
            having = [i for i, last in enumerate(tile_last) if last >= first]
            slots_LS = torch.stack([tile_slots[i][first : first + SPLIT] for i in having])
            splits.append((torch.tensor(having, device=self.device), slots_LS.to(self.device), first))
        query = torch.tensor(tile_first)[:, None] + torch.arange(TILE)
        return StrictPlan(
            rows=torch.tensor(rows, device=self.device),
            num_tiles=len(tile_first),
            query_position=query.to(self.device),
            splits=tuple(splits),
        )

    def _padded_slots(self, chunk: SequenceChunk) -> torch.Tensor:
        """Slots of the sequence up to the chunk's end, padded with slot 0 (masked, and zero) to whole splits."""
        pages = torch.tensor(chunk.pages[: -(-chunk.end // self.block_tokens)])
        slots = (pages[:, None] * self.block_tokens + torch.arange(self.block_tokens)).flatten()[: chunk.end]
        padded = torch.zeros(-(-chunk.end // SPLIT) * SPLIT, dtype=torch.long)
        padded[: chunk.end] = slots
        return padded

    def attend(
        self,
        q_TNH: torch.Tensor,
        keys_XKH: torch.Tensor,
        values_XKH: torch.Tensor,
        plan: AttentionPlan,
        shape: HeadShape,
    ) -> torch.Tensor:
        assert isinstance(plan, StrictPlan)
        kv, group, head_dim = shape.num_kv_heads, shape.group_size, shape.head_dim
        tiles = torch.zeros((plan.num_tiles * TILE, *q_TNH.shape[1:]), device=q_TNH.device)
        tiles[plan.rows] = q_TNH.float()
        # (tiles, K, TILE * G, H): one matrix for each tile and KV head, the same size for all.
        q = tiles.view(plan.num_tiles, TILE, kv, group, head_dim).permute(0, 2, 1, 3, 4)
        q = q.reshape(plan.num_tiles, kv, TILE * group, head_dim)

        highest = torch.full(q.shape[:-1], -1e30, device=q.device)
        total = torch.zeros(q.shape[:-1], device=q.device)
        out = torch.zeros_like(q)
        for having, slots_IS, first in plan.splits:
            keys, values = (
                pool[slots_IS.flatten()].float().unflatten(0, slots_IS.shape).transpose(1, 2).flatten(0, 1).contiguous()
                for pool in (keys_XKH, values_XKH)
            )
            scores = torch.bmm(q[having].flatten(0, 1), keys.transpose(1, 2)).unflatten(0, (len(having), kv))
            scores = scores * shape.scale
            if shape.softcap is not None:
                scores = shape.softcap * torch.tanh(scores / shape.softcap)
            scores = scores.masked_fill(self._hidden(plan.query_position[having], first, shape), -math.inf)

            before = highest[having]
            after = torch.maximum(before, scores.amax(-1))
            weights = (scores - after[..., None]).exp()
            kept = (before - after).exp()
            part = torch.bmm(weights.flatten(0, 1), values).unflatten(0, (len(having), kv))
            highest[having] = after
            total[having] = total[having] * kept + weights.sum(-1)
            out[having] = out[having] * kept[..., None] + part
        out = out / total.clamp_min(1e-30)[..., None]
        out = out.view(plan.num_tiles, kv, TILE, group, head_dim).permute(0, 2, 1, 3, 4)
        return out.reshape(plan.num_tiles * TILE, kv * group, head_dim)[plan.rows].to(q_TNH.dtype)

    def _hidden(self, query: torch.Tensor, first: int, shape: HeadShape) -> torch.Tensor:
        """(tiles, 1, TILE * G, SPLIT): true where a query does not see a key."""
        key = torch.arange(first, first + SPLIT, device=query.device)
        hidden = key > query[..., None]
        if shape.window is not None:
            hidden |= key <= query[..., None] - shape.window
        return hidden.repeat_interleave(shape.group_size, dim=1)[:, None]
