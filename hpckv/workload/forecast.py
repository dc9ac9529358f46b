"""What a run will compute and what it will find, before it runs: the plan's prefix tree beside what the store has. No torch."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hpckv.workload.plan import PlannedPrompt


@dataclass
class Forecast:
    """Of prompts that run in the plan's order, with memory for what they share.

    Counted as answers report it: `prompt_tokens` = sum of `cached` + `computed_tokens`.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached: Counter[str] = field(default_factory=Counter)
    """Prompt tokens by where they will be found; `device` where another request of the run had them before."""
    attended_tokens: int = 0
    """Pairs of a token that is computed and one before it."""
    loaded_blocks: int = 0
    """That come from a store."""
    new_blocks: int = 0
    """Distinct full blocks of prompts that are in no store yet."""
    new_shared_blocks: int = 0
    """Of these, those that more than one request uses."""

    @property
    def cached_tokens(self) -> int:
        return self.cached.total()

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def hit_percent(self) -> float:
        return 100 * self.cached_tokens / max(1, self.prompt_tokens)

    @property
    def record(self) -> dict[str, object]:
        """Plain data, for `plan.json`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached": dict(self.cached),
            "computed_tokens": self.computed_tokens,
            "hit_percent": round(self.hit_percent, 2),
        }


Nearest = Callable[[Sequence[bytes]], Sequence[str]]
"""For the leading blocks of a prefix that a store has: the tier that has each."""


def forecast(
    prompts: Iterable[PlannedPrompt], block_tokens: int, nearest: Nearest | None = None, *, reuses: bool = True
) -> Forecast:
    """What becomes of `prompts`, given in the plan's order; without `nearest` there is no store. See `cache.reuse` for `reuses`."""
    found = Forecast()
    uses: Counter[bytes] = Counter()
    fresh: set[bytes] = set()
    for prompt in prompts:
        keys, length = prompt.keys if reuses else (), len(prompt.token_ids)
        on_device = next((n for n, key in enumerate(keys) if key not in uses), len(keys))
        tiers = nearest(keys[on_device:]) if nearest and on_device < len(keys) else ()
        matched = on_device + len(tiers)
        # With every block known the last token is computed again, for its logits.
        limit = min(matched * block_tokens, length - 1)
        found.cached["device"] += min(on_device * block_tokens, limit)
        for number, tier in enumerate(tiers, on_device):
            found.cached[tier] += min(block_tokens, limit - number * block_tokens)
        found.attended_tokens += (length * (length - 1) - limit * (limit - 1)) // 2
        fresh.update(keys[matched:])
        uses.update(keys)
        found.requests += 1
        found.prompt_tokens += length
        found.loaded_blocks += len(tiers)
    found.new_blocks = len(fresh)
    found.new_shared_blocks = sum(uses[key] > 1 for key in fresh)
    return found


@dataclass(frozen=True)
class Decoding:
    """What the answers of a run will be."""

    output_tokens: list[int]
    """Of each sequence, in the plan's order."""
    attended_tokens: float
    """Pairs of a token of an answer and one before it. A block that several sequences share counts as often as it is read."""


def decoding(
    prompts: Sequence[PlannedPrompt], output_tokens: Sequence[int], block_tokens: int, num_sharing: int
) -> Decoding:
    """Of sequences, in the plan's order, that give so many tokens each; up to `num_sharing` at a time read a block once for all."""
    uses = Counter(key for prompt in prompts for key in prompt.keys)
    attended = 0.0
    for prompt, tokens in zip(prompts, output_tokens, strict=True):
        before = (
            len(prompt.token_ids)
            - len(prompt.keys) * block_tokens
            + sum(block_tokens / min(uses[key], num_sharing) for key in prompt.keys)
        )
        attended += tokens * (before + tokens / 2)
    return Decoding(list(output_tokens), attended)


def decode_steps(output_tokens: Sequence[int], num_at_once: int) -> int:
    """Steps until sequences that give so many tokens are through, in this order, `num_at_once` of them at a time."""
    ends: list[int] = []
    for tokens in output_tokens:
        start = heapq.heappop(ends) if len(ends) == num_at_once else 0
        heapq.heappush(ends, start + max(0, tokens - 1))  # the first comes with the prompt
    return max(ends, default=0)
