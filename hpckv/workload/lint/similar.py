"""Opening texts that differ by a few characters: a typing error, a name, a leftover of an earlier version."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hpckv.workload.lint.embedded import rewritten
from hpckv.workload.lint.masks import masked
from hpckv.workload.lint.prompts import Prompt, Repaired, Spot, paragraphs
from hpckv.workload.lint.walk import without_spacing

_LEAST = 120
"""Characters of an opening that is looked at."""
_WINDOW = 32
"""Characters within which all differences lie, at most."""
_CORNER = 48
"""Characters at the beginning or the end that two openings share, or they are not compared."""
_COMPARED = 4
"""Openings with one beginning or end that another is compared with: the most frequent ones. Keeps this linear."""


class FewCharacters:
    """The system message, or the first paragraph of a plain prompt, is another's but for a few characters."""

    kind = "near-identical prefix: a few characters"
    what = "the opening differs from a more frequent one by a few characters"
    remedy = "by hand: make them one text, or move what differs behind what is common"
    is_safe = False

    def repair(self, prompts: Sequence[Prompt]) -> Repaired:
        """Prompts with the more frequent opening, and in a paragraph at the end what was there instead."""
        counts = Counter(_opening(prompt) for prompt in prompts)
        pairs = _pairs([text for text, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))])
        repaired = Repaired(list(prompts))
        for index, prompt in enumerate(prompts):
            opening = _opening(prompt)
            if opening in pairs:
                leader, start, end = pairs[opening]
                after = prompt.with_text(0, leader + prompt.messages[0].text[len(opening) :])
                spot = Spot(prompt.number, 1, start + 1, opening[start:end] or opening[max(0, start - 20) : start + 20])
                repaired.put(index, after.with_end(opening[start:end]), spot)
        return repaired


def _opening(prompt: Prompt) -> str:
    if not prompt.messages:
        return ""
    text = prompt.messages[0].text
    return text if len(prompt.messages) > 1 else paragraphs(text)[0][0]


def _pairs(openings: Sequence[str]) -> dict[str, tuple[str, int, int]]:
    """Of each opening that is nearly another, more frequent one: that one, and where they differ. Given by frequency."""
    leaders: dict[tuple[bool, str], list[str]] = {}
    pairs: dict[str, tuple[str, int, int]] = {}
    for opening in openings:
        if len(opening) < _LEAST:
            continue
        corners = [
            leaders.setdefault(corner, []) for corner in ((True, opening[:_CORNER]), (False, opening[-_CORNER:]))
        ]
        for leader in dict.fromkeys(corners[0] + corners[1]):
            if window := _difference(leader, opening):
                pairs[opening] = leader, *window
                break
        else:
            for corner in corners:
                if len(corner) < _COMPARED:
                    corner.append(opening)
    return pairs


def _difference(leader: str, opening: str) -> tuple[int, int] | None:
    """Where `opening` differs: in one short stretch, and not just in white space, case, values or the form of JSON."""
    start = _num_common(leader, opening)
    behind = min(_num_common(leader[::-1], opening[::-1]), min(len(leader), len(opening)) - start)
    if max(len(leader), len(opening)) - start - behind > _WINDOW:
        return None
    around = max(0, start - _CORNER)
    there, here = (_said(text[around : len(text) - behind + _CORNER]) for text in (leader, opening))
    if there == here or _said(rewritten(leader)) == _said(rewritten(opening)):
        return None
    return start, len(opening) - behind


def _num_common(a: str, b: str) -> int:
    """Characters with which both begin, by bisection: comparing slices is quicker than a loop over characters."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _said(text: str) -> str:
    return masked(" ".join(without_spacing(text).casefold().split()))
