"""Runs one scheduled step on the device: inputs, forward, logits of the rows that sample.

In strict mode a step is cut into micro-steps of exactly `STRICT_ROWS` rows, so that every linear layer is always
called with one shape; `check_row_invariance` proves on this machine, at start, that a row's result then depends
neither on its place nor on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hpckv.attention import SequenceChunk
from hpckv.engine.scheduler import ScheduledChunk, StepPlan
from hpckv.errors import CapabilityError
from hpckv.kvcache.kv_pool import KVPool
from hpckv.kvcache.page_pool import TRASH_PAGE
from hpckv.model.decoder import Decoder, StepInput

STRICT_ROWS = 64
STRICT_LOGIT_ROWS = 8


class Runner:
    """A decoder, its pages, and the arithmetic mode."""

    def __init__(self, decoder: Decoder, pool: KVPool, *, numerics: str) -> None:
        self.decoder = decoder
        self.pool = pool
        self.is_strict = numerics == "strict"
        self._block_tokens = pool.geometry.block_tokens
        if self.is_strict:
            check_row_invariance(decoder)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> torch.Tensor:
        """Compute the step's keys and values into their pages; logits (R, V) in fp32 of the chunks that sample."""
        hidden = [self._forward(part) for part in self._micro_steps(plan.chunks)]
        x_TD = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        rows, last = [], -1
        for chunk in plan.chunks:
            last += chunk.num_tokens
            if chunk.samples:
                rows.append(last)
        return self._logits(x_TD[rows])

    def _micro_steps(self, chunks: Sequence[ScheduledChunk]) -> Iterator[list[ScheduledChunk]]:
        if not self.is_strict:
            yield list(chunks)
            return
        part: list[ScheduledChunk] = []
        room = STRICT_ROWS
        for chunk in chunks:
            start = chunk.start
            while start < chunk.end:
                count = min(room, chunk.end - start)
                part.append(ScheduledChunk(chunk.seq, start, count, samples=False))
                start, room = start + count, room - count
                if room == 0:
                    yield part
                    part, room = [], STRICT_ROWS
        if part:
            yield part

    def _forward(self, chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
        size, device = self._block_tokens, self.decoder.device
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for chunk in chunks:
            seq = chunk.seq
            ids += seq.tokens[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            # A block that is registered is complete and may be shared: its page is never written again.
            shared_end = seq.num_registered * size
            slots += [
                (TRASH_PAGE if p < shared_end else seq.pages[p // size]) * size + p % size
                for p in range(chunk.start, chunk.end)
            ]
        sequences = [SequenceChunk(c.start, c.num_tokens, c.seq.pages) for c in chunks]
        num_rows = len(ids)
        padding = STRICT_ROWS - num_rows if self.is_strict else 0
        if padding:  # rows of a made-up sequence in the trash page
            ids += [0] * padding
            positions += [0] * padding
            slots += [TRASH_PAGE * size] * padding
            sequences += [SequenceChunk(0, 1, (TRASH_PAGE,))] * padding
        step = StepInput(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(slots, device=device),
            self.decoder.backend.plan(sequences, self.decoder.windows),
        )
        return self.decoder.forward(step, self.pool.layers)[:num_rows]

    def _logits(self, x_RD: torch.Tensor) -> torch.Tensor:
        if not self.is_strict:
            return self.decoder.logits(x_RD)
        parts = []
        for part in torch.split(x_RD, STRICT_LOGIT_ROWS) if len(x_RD) else ():
            padded = torch.nn.functional.pad(part, (0, 0, 0, STRICT_LOGIT_ROWS - len(part)))
            parts.append(self.decoder.logits(padded)[: len(part)])
        return torch.cat(parts) if parts else x_RD.new_empty((0, self.decoder.config.vocab_size), dtype=torch.float32)


@torch.inference_mode()
def check_row_invariance(decoder: Decoder) -> None:
    """Raise `CapabilityError` if a row's result depends on its place or its neighbours, in any of the linear layers."""
    assert decoder.head is not None
    layer = decoder.layers[0]
    linears = [layer.attention.qkv, layer.attention.out.linear, layer.mlp.gate_up, layer.mlp.down.linear]
    generator = torch.Generator().manual_seed(0)
    for linear, rows in [*((linear, STRICT_ROWS) for linear in linears), (decoder.head.linear, STRICT_LOGIT_ROWS)]:
        x = torch.randn(rows, linear.in_features, generator=generator).to(decoder.device, decoder.dtype)
        wanted = linear(x)
        for _ in range(3):
            order = torch.randperm(rows, generator=generator).to(x.device)
            other = torch.randn(x.shape, generator=generator).to(x)
            other[: rows // 2] = x[order[: rows // 2]]
            if not torch.equal(linear(other)[: rows // 2], wanted[order[: rows // 2]]):
                raise CapabilityError(
                    "engine.numerics: strict is not possible here: this machine's matrix product of "
                    f"{rows} x {linear.in_features} x {linear.out_features} in {decoder.dtype} depends on row order"
                )
