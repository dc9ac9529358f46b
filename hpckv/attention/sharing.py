"""Which chunks of a step read the same pages: attention over those is done once for the group. No torch.

Two sequences over one prefix hold the same page numbers, so equal leading pages *are* the shared prefix, and
nested sharing (a system prompt, then one of three documents) falls out of the recursion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from hpckv.attention.backend import SequenceChunk

MIN_SAVED_TOKENS = 256
"""A group is worth its extra pass and merge when it spares at least so many reads of a cached token."""


@dataclass(frozen=True)
class SharedRun:
    """Pages [first, last) of every chunk in `members` (indices into the step's chunks) are the same."""

    members: tuple[int, ...]
    first: int
    last: int


def find_shared_runs(
    chunks: Sequence[SequenceChunk], block_tokens: int, min_saved_tokens: int = MIN_SAVED_TOKENS
) -> tuple[list[SharedRun], list[int]]:
    """Shared runs of full past pages, and for each chunk the first page that none of its runs covers.

    Only pages that lie wholly before a chunk's first token count: those every row of it attends in full.
    """
    runs: list[SharedRun] = []
    covered = [0] * len(chunks)

    def page(member: int, depth: int) -> int:
        chunk = chunks[member]
        return chunk.pages[depth] if depth < chunk.start // block_tokens else -1

    def descend(members: list[int], depth: int, open_from: int) -> None:
        # Follow the pages that all members share, then split where they part.
        while (p := page(members[0], depth)) >= 0 and all(page(m, depth) == p for m in members):
            depth += 1
        if (depth - open_from) * block_tokens * (len(members) - 1) >= min_saved_tokens:
            runs.append(SharedRun(tuple(members), open_from, depth))
            for m in members:
                covered[m] = depth
            open_from = depth
        ordered = sorted(members, key=lambda m: page(m, depth))
        for p, group in groupby(ordered, key=lambda m: page(m, depth)):
            part = list(group)
            if p >= 0 and len(part) > 1:
                descend(part, depth + 1, open_from)

    if len(chunks) > 1:
        members = sorted(range(len(chunks)), key=lambda m: page(m, 0))
        for p, group in groupby(members, key=lambda m: page(m, 0)):
            part = list(group)
            if p >= 0 and len(part) > 1:
                descend(part, 0, 0)
    return runs, covered
