"""Reads all prompts side by side, unit by unit, and finds where those that say the same are written differently.

Prompts that have the same gist so far - without case, white space, dates, numbers and ids - form a node of a prefix tree. Where
they differ as written, no prefix can be reused. A prompt that is alone is not followed further, so what only it says is never
looked at.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain

from hpckv.workload.lint.masks import masked
from hpckv.workload.lint.prompts import Start, Units

_INNER_SPACE = re.compile(r"(?<=\S)[^\S\n]+")
_INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u2060"))
_KEPT_UNITS = 1 << 17


@lru_cache(_KEPT_UNITS)
def without_spacing(unit: str) -> str:
    """A unit in normal form C, each gap inside it one space; its indentation stays, and whether a line ends with it."""
    text = unicodedata.normalize("NFC", unit.translate(_INVISIBLE))
    bare = text.rstrip()
    if not bare:
        return ""
    end = text[len(bare) :]
    return _INNER_SPACE.sub(" ", bare) + ("\n" if "\n" in end else end[:1] and " ")


@lru_cache(_KEPT_UNITS)
def gist(unit: str) -> str:
    """What a unit says, however it is written and whatever its values are; roles are no text."""
    return "\0" + unit if isinstance(unit, Start) else masked(without_spacing(unit)).casefold()


def nodes(rows: Sequence[Units]) -> Iterator[tuple[int, dict[str, list[int]]]]:
    """(place, rows by their unit at `place`) of at least two rows that have the same gist so far, that unit included.

    A node comes before its children.
    """
    cut = [row.seen for row in rows]
    todo = [(0, list(range(len(rows))))]
    while todo:
        place, members = todo.pop()
        by_text: dict[str, list[int]] = defaultdict(list)
        for row in members:
            piece = cut[row][place] if place < len(cut[row]) else rows[row].at(place)
            if piece is not None:
                by_text[piece].append(row)
        by_gist: dict[str, dict[str, list[int]]] = defaultdict(dict)
        for text, found in by_text.items():
            by_gist[gist(text)][text] = found
        for child in by_gist.values():
            below = list(chain.from_iterable(child.values()))
            if len(below) > 1:
                yield place, child
                todo.append((place + 1, below))
