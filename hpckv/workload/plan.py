"""The plan of a run: in which order prompts are worked through, and what that costs at least. No torch.

All prompts are known before the first forward, so they form one prefix tree. Walked depth first, prompts that share
a beginning are neighbours: a shared prefix is computed once, stays on the device while its subtree runs, and is
not needed afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt's tokens and the keys of its full blocks."""

    token_ids: list[int]
    keys: Sequence[bytes]


@dataclass(frozen=True)
class RunPlan:
    """Order and sums of a run."""

    order: list[int]
    """Indices of the prompts, depth first."""
    prompt_tokens: int
    least_prefill_tokens: int
    """Distinct full blocks and every prompt's ragged end: what must be computed with an empty cache of any size."""
    num_blocks: int
    num_distinct_blocks: int

    @property
    def summary(self) -> dict[str, object]:
        """For `plan.json`."""
        return {
            "requests": len(self.order),
            "prompt_tokens": self.prompt_tokens,
            "least_prefill_tokens": self.least_prefill_tokens,
            "shared_percent": round(100 * (1 - self.least_prefill_tokens / max(1, self.prompt_tokens)), 2),
            "blocks": self.num_blocks,
            "distinct_blocks": self.num_distinct_blocks,
            "order": self.order,
        }


def plan_run(prompts: Sequence[PlannedPrompt], block_tokens: int) -> RunPlan:
    """Depth-first order and the least possible prefill of `prompts`."""
    # Sorted by tokens, every subtree of the prefix tree is one contiguous range.
    order = sorted(range(len(prompts)), key=lambda n: prompts[n].token_ids)
    sizes = [(len(prompt.token_ids), prompt.keys) for prompt in prompts]
    least, num_distinct = least_prefill([sizes[number] for number in order], block_tokens)
    total = sum(length for length, _ in sizes)
    return RunPlan(order, total, least, sum(len(keys) for _, keys in sizes), num_distinct)


def least_prefill(sizes: Iterable[tuple[int, Sequence[bytes]]], block_tokens: int) -> tuple[int, int]:
    """Tokens that must be computed at least, and distinct blocks, of prompts given as their tokens and keys of full blocks.

    A prompt that begins another one comes before it, as in the plan's order, or in order of length.
    """
    seen: set[bytes] = set()
    least = 0
    for length, keys in sizes:
        fresh = [key for key in keys if key not in seen]
        seen.update(fresh)
        ragged = length - len(keys) * block_tokens
        # A prompt of whole blocks that are all known still computes its last token, for its logits.
        least += len(fresh) * block_tokens + (ragged or not fresh)
    return least, len(seen)


def most_tokens_in_use(prompts: Sequence[PlannedPrompt], outputs: Sequence[int], block_tokens: int) -> int:
    """Tokens of pages that the run can use at most: each distinct block once, and every ragged end with its answer."""
    distinct = {key for prompt in prompts for key in prompt.keys}
    private = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        tail = len(prompt.token_ids) - len(prompt.keys) * block_tokens + output
        private += -(-tail // block_tokens) * block_tokens
    return len(distinct) * block_tokens + private
