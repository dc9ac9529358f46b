"""The next token of every row, from its logits and its own parameters.

Randomness is a function of (seed, position) alone, so a request's text depends neither on its batch mates nor on
restarts. The draw is made on the host in fp64.

With the vocabulary split over tensor ranks no rank ever needs a whole row: each gives its most probable tokens and the
log-sum-exp of all it has, and draws the same token from what is gathered. Only where that does not settle a draw (a flat
distribution, ties at the edge of what was given) the row is gathered whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hpckv.comm import Collectives, SingleRank
from hpckv.engine.request import SamplingParams, TokenLogprob

_MASK = (1 << 64) - 1
_CANDIDATES = 256
"""Most probable tokens each rank gives for a draw from an unbounded distribution."""
_MOST_CANDIDATES = 4096
"""No matter how large `top_k` is: beyond it the row is gathered whole."""
_LEAST_TEMPERATURE = 1e-6
_ROUNDING = 1e-7
"""Probabilities add up to `top_p` if no more than this is missing: three times a tenth are 0.3, on any number of ranks."""

Floats = npt.NDArray[np.float64]


class Draw(NamedTuple):
    """What one row is sampled with; `position` is the new token's place in its sequence."""

    params: SamplingParams
    seed: int
    position: int

    @property
    def num_candidates(self) -> int:
        """Most probable tokens that settle the draw, as far as one can know before."""
        if self.params.temperature == 0:
            return max(1, self.params.logprobs or 0)
        return max(min(self.params.top_k, _MOST_CANDIDATES) or _CANDIDATES, self.params.logprobs or 0)

    @property
    def temperature(self) -> float:
        """What logits are divided by: no less than what leaves them some digits."""
        return max(self.params.temperature, _LEAST_TEMPERATURE)

    @property
    def is_plain(self) -> bool:
        """Whether the most probable token is all that is asked for."""
        return self.params.temperature == 0 and self.params.logprobs is None


@dataclass(frozen=True)
class Sampled:
    """What became of one row."""

    token: int
    logprob: TokenLogprob | None = None
    is_finite: bool = True
    """False if the logits hold NaN or infinity: the token means nothing."""


def sample(
    logits_RV: torch.Tensor, draws: Sequence[Draw], *, first_id: int = 0, collectives: Collectives | None = None
) -> list[Sampled]:
    """One token a row, and its log-probability where the row asks for it; the same on every tensor rank.

    `logits_RV` is fp32: this rank's part of the vocabulary, from token `first_id` on. Log-probabilities are the model's own,
    before temperature, top-k and top-p.
    """
    if not draws:
        return []
    collectives = collectives or SingleRank()
    found = _plain(logits_RV, first_id, collectives)
    rows = [row for row, draw in enumerate(draws) if not draw.is_plain and found[row].is_finite]
    if rows:
        chosen = [draws[row] for row in rows]
        for row, drawn in zip(rows, _draw_rows(logits_RV[rows], chosen, first_id, collectives), strict=True):
            assert drawn is not None
            found[row] = drawn
    return found


def uniform(seed: int, position: int) -> float:
    """In [0, 1), by splitmix64 of the pair."""
    x = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((x ^ (x >> 31)) >> 11) / (1 << 53)


def _plain(logits_RV: torch.Tensor, first_id: int, collectives: Collectives) -> list[Sampled]:
    """Every row's most probable token; of equals the lowest id."""
    if logits_RV.shape[1]:
        values, ids = logits_RV.max(-1)
    else:
        values, ids = (
            logits_RV.new_full((len(logits_RV),), -torch.inf),
            torch.zeros(len(logits_RV), dtype=torch.int64),
        )
    is_finite = logits_RV.sum(-1).isfinite()  # one pass: NaN and infinity outlive any sum
    own = torch.stack([values.double(), (ids + first_id).double(), is_finite.double()], dim=-1).cpu()
    whole = collectives.all_gather(own).numpy().reshape(len(own), -1, 3)
    best = whole[:, :, 0].argmax(-1)
    tokens = whole[np.arange(len(own)), best, 1].astype(int).tolist()
    finite = [bool(row.all()) for row in whole[:, :, 2]]
    return [Sampled(token, None, is_finite) for token, is_finite in zip(tokens, finite, strict=True)]


@dataclass(frozen=True)
class _Known:
    """The most probable tokens of one row, in order: logits, ids; and the log-sum-exp of the whole row."""

    logits: Floats
    ids: npt.NDArray[np.int64]
    lse: float
    lse_tempered: float
    is_whole: bool


def _draw_rows(
    logits_RV: torch.Tensor, draws: Sequence[Draw], first_id: int, collectives: Collectives
) -> list[Sampled | None]:
    count = max(draw.num_candidates for draw in draws)
    known = _gather_candidates(logits_RV, draws, count, first_id, collectives)
    found = [_settle(row, draw) for row, draw in zip(known, draws, strict=True)]
    unsettled = [row for row, sampled in enumerate(found) if sampled is None]
    if unsettled:  # the same rows on every rank
        width = int(collectives.all_gather(torch.tensor([[logits_RV.shape[1]]])).max())
        some = [draws[row] for row in unsettled]
        whole = _gather_candidates(logits_RV[unsettled], some, width, first_id, collectives)
        for row, everything, draw in zip(unsettled, whole, some, strict=True):
            found[row] = _settle(everything, draw)
    return found


def _gather_candidates(
    logits_RV: torch.Tensor, draws: Sequence[Draw], count: int, first_id: int, collectives: Collectives
) -> list[_Known]:
    """Every rank's `count` most probable tokens and one more, which tells how far they are all there are."""
    size = logits_RV.shape[1]
    held = min(size, count + 1)
    values, ids = (t.cpu() for t in logits_RV.topk(held, dim=-1))
    exact = logits_RV.double()
    scale = torch.tensor([draw.temperature for draw in draws], dtype=torch.float64)
    lse = exact.logsumexp(-1).cpu()
    tempered = (exact / scale.to(exact.device)[:, None]).logsumexp(-1).cpu()
    # Below this logit there may be tokens that were not given.
    edge = values[:, -1].double() if held < size else torch.full((len(values),), -torch.inf, dtype=torch.float64)
    own = torch.full((len(values), 2, count + 1), -torch.inf, dtype=torch.float64)
    own[:, 0, :held], own[:, 1, :held] = values.double(), (ids + first_id).double()
    packed = torch.cat([own.flatten(1), lse[:, None], tempered[:, None], edge[:, None]], dim=1)
    whole = collectives.all_gather(packed).numpy().reshape(len(values), -1, packed.shape[1])
    return [_merge(row, count + 1) for row in whole]


def _merge(parts: Floats, width: int) -> _Known:
    """One row's candidates of all ranks, as far as their order is certain."""
    logits, ids = parts[:, :width].reshape(-1), parts[:, width : 2 * width].reshape(-1)
    lse, tempered, edge = parts[:, -3], parts[:, -2], float(parts[:, -1].max())
    order = np.lexsort((ids, -logits))
    certain = order[logits[order] > edge]
    return _Known(
        logits[certain],
        ids[certain].astype(np.int64),
        float(np.logaddexp.reduce(lse)),
        float(np.logaddexp.reduce(tempered)),
        edge == -np.inf,
    )


def _settle(known: _Known, draw: Draw) -> Sampled | None:
    """The row's token, or None if more of it must be known."""
    params = draw.params
    if not len(known.ids) or (len(known.ids) < (params.logprobs or 0) and not known.is_whole):
        return None
    place = 0 if params.temperature == 0 else _place(known, draw)
    if place is None:
        return None
    token = int(known.ids[place])
    if params.logprobs is None:
        return Sampled(token)
    shown = range(min(params.logprobs, len(known.ids)))
    top = tuple((int(known.ids[n]), float(known.logits[n] - known.lse)) for n in shown)
    return Sampled(token, TokenLogprob(token, float(known.logits[place] - known.lse), top))


def _place(known: _Known, draw: Draw) -> int | None:
    """Which of the candidates is drawn."""
    params = draw.params
    scaled, lse = known.logits / draw.temperature, known.lse_tempered
    is_bounded = known.is_whole
    if params.top_k:
        if len(scaled) < params.top_k and not known.is_whole:
            return None
        scaled, is_bounded = scaled[: params.top_k], True
        lse = float(np.logaddexp.reduce(scaled))
    cumulative = np.exp(scaled - lse).cumsum()
    if params.top_p < 1:
        keep = int((cumulative < params.top_p - _ROUNDING).sum()) + 1  # the token that reaches the threshold stays
        if keep > len(cumulative) and not is_bounded:
            return None
        cumulative, is_bounded = cumulative[:keep], True
    target = uniform(draw.seed, draw.position) * (float(cumulative[-1]) if is_bounded else 1.0)
    place = int((cumulative <= target).sum())
    if place < len(cumulative):
        return place
    return len(cumulative) - 1 if is_bounded else None
