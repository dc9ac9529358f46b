"""Runs one scheduled step on this rank's device: inputs, forward, the tokens that follow.

In strict mode a step is cut into micro-steps of exactly `STRICT_ROWS` rows, so that every linear layer is always
called with one shape; `check_row_invariance` proves on this machine, at start, that a row's result then depends
neither on its place nor on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hpckv.attention import SequenceChunk
from hpckv.engine.sampler import Sampled, sample
from hpckv.engine.step import RankChunk
from hpckv.errors import CapabilityError
from hpckv.kvcache.kv_pool import KVPool
from hpckv.kvcache.page_pool import TRASH_PAGE
from hpckv.model.decoder import Decoder, StepInput

STRICT_ROWS = 64
STRICT_LOGIT_ROWS = 8


class Runner:
    """This rank's part of a decoder, its pages, and the arithmetic mode."""

    def __init__(self, decoder: Decoder, pool: KVPool, *, numerics: str) -> None:
        self.decoder = decoder
        self.pool = pool
        self.is_strict = numerics == "strict"
        self._block_tokens = pool.geometry.block_tokens
        if self.is_strict:
            check_row_invariance(decoder)

    def run(self, chunks: Sequence[RankChunk]) -> list[Sampled]:
        """The whole model's step, where it has one stage: what was sampled, in the order of the chunks that sample."""
        return self.sample(chunks, self.forward(chunks))

    @torch.inference_mode()
    def forward(self, chunks: Sequence[RankChunk], x_TD: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the step's keys and values into their pages; the stream behind this stage, (T, D).

        `x_TD` is the stream that the stage before gave; None on the first one.
        """
        done, parts = 0, []
        for part in self._micro_steps(chunks):
            count = sum(chunk.num_tokens for chunk in part)
            parts.append(self._forward(part, None if x_TD is None else x_TD[done : done + count]))
            done += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.inference_mode()
    def sample(self, chunks: Sequence[RankChunk], x_TD: torch.Tensor) -> list[Sampled]:
        """The next token of the chunks that sample, from the last stage's stream."""
        rows, draws, last = [], [], -1
        for chunk in chunks:
            last += chunk.num_tokens
            if chunk.draw is not None:
                rows.append(last)
                draws.append(chunk.draw)
        if not rows:
            return []
        head = self.decoder.head
        assert head is not None
        return sample(self.logits(x_TD[rows]), draws, first_id=head.first, collectives=self.decoder.collectives)

    def logits(self, x_RD: torch.Tensor) -> torch.Tensor:
        """This rank's part of the logits of some rows, fp32."""
        if not self.is_strict:
            return self.decoder.logits(x_RD)
        parts = []
        for part in torch.split(x_RD, STRICT_LOGIT_ROWS):
            padded = torch.nn.functional.pad(part, (0, 0, 0, STRICT_LOGIT_ROWS - len(part)))
            parts.append(self.decoder.logits(padded)[: len(part)])
        return torch.cat(parts)

    def _micro_steps(self, chunks: Sequence[RankChunk]) -> Iterator[list[RankChunk]]:
        if not self.is_strict:
            yield list(chunks)
            return
        part: list[RankChunk] = []
        room = STRICT_ROWS
        for chunk in chunks:
            first = 0
            while first < chunk.num_tokens:
                count = min(room, chunk.num_tokens - first)
                part.append(chunk.part(first, count))
                first, room = first + count, room - count
                if room == 0:
                    yield part
                    part, room = [], STRICT_ROWS
        if part:
            yield part

    def _forward(self, chunks: Sequence[RankChunk], x_TD: torch.Tensor | None) -> torch.Tensor:
        size, device = self._block_tokens, self.decoder.device
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for chunk in chunks:
            ids += chunk.tokens
            positions += range(chunk.start, chunk.end)
            # A block that is registered is complete and may be shared: its page is never written again.
            shared_end, pages = chunk.num_registered * size, chunk.pages
            slots += [
                (TRASH_PAGE if p < shared_end else pages[p // size]) * size + p % size
                for p in range(chunk.start, chunk.end)
            ]
        sequences = [SequenceChunk(c.start, c.num_tokens, c.pages, c.owner) for c in chunks]
        num_rows = len(ids)
        padding = STRICT_ROWS - num_rows if self.is_strict else 0
        if padding:  # rows of a made-up sequence in the trash page
            ids += [0] * padding
            positions += [0] * padding
            slots += [TRASH_PAGE * size] * padding
            sequences += [SequenceChunk(0, 1, (TRASH_PAGE,))] * padding
        step = StepInput(
            torch.tensor(positions, device=device),
            torch.tensor(slots, device=device),
            self.decoder.backend.plan(sequences, self.decoder.windows),
        )
        if x_TD is None:
            x_TD = self.decoder.embed(torch.tensor(ids, device=device))
        elif padding:
            x_TD = torch.nn.functional.pad(x_TD, (0, 0, 0, padding))
        return self.decoder.forward(x_TD, step, self.pool.layers)[:num_rows]


@torch.inference_mode()
def check_row_invariance(decoder: Decoder) -> None:
    """Raise `CapabilityError` if a row's result depends on its place or its neighbours, in any of the linear layers."""
    layer = decoder.layers[0]
    linears = [layer.attention.qkv, layer.attention.out.linear, layer.mlp.gate_up, layer.mlp.down.linear]
    checks = [(linear, STRICT_ROWS) for linear in linears]
    if decoder.head is not None:
        checks.append((decoder.head.linear, STRICT_LOGIT_ROWS))
    generator = torch.Generator().manual_seed(0)
    for linear, rows in checks:
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
