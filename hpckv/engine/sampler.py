"""The next token of every row, from its logits and its own parameters.

Randomness is a function of (seed, position) alone, so a request's text depends neither on its batch mates nor on
restarts. The draw is made on the CPU in fp64 from the row's own logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hpckv.engine.request import SamplingParams, TokenLogprob

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Draw:
    """What one row is sampled with; `position` is the new token's place in its sequence."""

    params: SamplingParams
    seed: int
    position: int


def sample(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[TokenLogprob | None]]:
    """One token a row, and its log-probability where the row asks for it. `logits_RV` is fp32.

    Log-probabilities are the model's own, before temperature, top-k and top-p.
    """
    tokens: list[int] = logits_RV.argmax(-1).tolist()
    for row, draw in enumerate(draws):
        if draw.params.temperature > 0:
            tokens[row] = _draw(logits_RV[row], draw)
    logprobs: list[TokenLogprob | None] = [None] * len(tokens)
    for row, draw in enumerate(draws):
        if draw.params.logprobs is not None:
            logprobs[row] = _logprob(logits_RV[row], tokens[row], draw.params.logprobs)
    return tokens, logprobs


def uniform(seed: int, position: int) -> float:
    """In [0, 1), by splitmix64 of the pair."""
    x = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((x ^ (x >> 31)) >> 11) / (1 << 53)


def _draw(logits_V: torch.Tensor, draw: Draw) -> int:
    params = draw.params
    scaled = logits_V.cpu().double() / params.temperature
    # Stable: equal logits keep the order of their token ids on every machine.
    ordered, ids = torch.sort(scaled, descending=True, stable=True)
    if params.top_k:
        ordered, ids = ordered[: params.top_k], ids[: params.top_k]
    cumulative = ordered.softmax(-1).cumsum(-1)
    if params.top_p < 1:
        keep = int((cumulative < params.top_p).sum()) + 1  # the token that crosses the threshold stays
        cumulative, ids = cumulative[:keep], ids[:keep]
    target = uniform(draw.seed, draw.position) * float(cumulative[-1])
    return int(ids[min(int((cumulative <= target).sum()), len(ids) - 1)])


def _logprob(logits_V: torch.Tensor, token: int, num_top: int) -> TokenLogprob:
    logprobs = logits_V.cpu().log_softmax(-1)
    values, ids = logprobs.topk(num_top) if num_top else (torch.empty(0), torch.empty(0))
    top = tuple((int(i), float(v)) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
