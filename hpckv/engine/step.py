"""A step: its chunks as any rank sees them, without the requests they are of, and where its time goes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hpckv.engine.scheduler import StepPlan

if TYPE_CHECKING:
    from hpckv.engine.sampler import Draw


class RankChunk(NamedTuple):
    """Consecutive tokens of one sequence: what to compute, and where its keys and values are."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    """Of everything up to the chunk's end, perhaps more."""
    num_registered: int
    """Leading pages that are shared and never written again."""
    owner: int
    """Names the sequence's admission, as `SequenceChunk.owner`."""
    draw: Draw | None
    """How the next token is sampled, if it follows from this chunk."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def part(self, first: int, count: int) -> RankChunk:
        """Tokens [first, first + count) of it."""
        return RankChunk(
            self.tokens[first : first + count],
            self.start + first,
            self.pages,
            self.num_registered,
            self.owner,
            self.draw,
        )


def rank_chunks(plan: StepPlan) -> list[RankChunk]:
    """A plan as the ranks see it."""
    from hpckv.engine.sampler import Draw

    return [
        RankChunk(
            c.seq.tokens[c.start : c.end],
            c.start,
            c.seq.pages,
            c.seq.num_registered,
            c.seq.admission,
            Draw(c.seq.params, c.seq.seed, len(c.seq.tokens)) if c.samples else None,
        )
        for c in plan.chunks
    ]


@dataclass
class StepTimes:
    """Seconds spent in each part of the steps so far."""

    schedule_s: float = 0.0
    forward_s: float = 0.0
    prefill_s: float = 0.0
    """Of these: for prompts, as far as they are of a step's tokens."""
    sample_s: float = 0.0
    load_s: float = 0.0
    """Waiting for stored blocks with nothing to compute meanwhile."""

    def note_forward(self, plan: StepPlan, seconds: float) -> None:
        """A step's forward, or a part of it."""
        self.forward_s += seconds
        self.prefill_s += seconds * plan.num_prompt_tokens / max(1, plan.num_tokens)
