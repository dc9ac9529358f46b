"""Near-identical prefixes: the same words in other white space, line endings, normal form, or case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpckv.workload.lint.embedded import has_same_values
from hpckv.workload.lint.prompts import Prompt, Repaired, Spot, from_units, place_of, units
from hpckv.workload.lint.walk import nodes, without_spacing


@dataclass(frozen=True)
class Spelling:
    """Finds prefixes that are equal under `fold`, and writes all of them as most are written."""

    kind: str
    what: str
    remedy: str
    fold: Callable[[str], str]
    is_safe: bool

    def repair(self, prompts: Sequence[Prompt]) -> Repaired:
        """Prompts with one spelling of every shared prefix."""
        rows = [units(prompt) for prompt in prompts]
        changed: dict[int, dict[int, str]] = {}
        for place, members in nodes(rows):
            if len(members) == 1:
                continue
            spellings: dict[str, list[str]] = defaultdict(list)
            for text in members:
                spellings[self.fold(text)].append(text)
            for texts in spellings.values():
                # White space around a message goes: what is moved in a message leaves some there, and it must not grow.
                usual = min(
                    texts, key=lambda text: (-len(members[text]) if without_spacing(text) else 0, len(text), text)
                )
                for text in texts:
                    if text != usual:
                        for row in members[text]:
                            changed.setdefault(row, {})[place] = usual
        repaired = Repaired(list(prompts))
        for row, edits in changed.items():
            pieces = [edits.get(place, piece) for place, piece in enumerate(rows[row])]
            after = from_units(prompts[row], pieces)
            if _is_empty(after) and not _is_empty(prompts[row]):
                continue  # a prompt must not be
            if not self.is_safe or has_same_values(prompts[row], after):
                first = min(edits)
                repaired.put(
                    row, after, Spot(prompts[row].number, *place_of(rows[row], first), _around(rows[row], first))
                )
        return repaired


def _is_empty(prompt: Prompt) -> bool:
    return not all(message.text for message in prompt.messages)


def _around(row: Sequence[str], place: int) -> str:
    """The unit; for white space alone with what stands around it."""
    return row[place] if row[place].strip() else "".join(row[max(0, place - 1) : place + 2])


SPACING = Spelling(
    "near-identical prefix: white space",
    "prefixes are equal but for white space, line endings, a byte order mark or Unicode normal form",
    "--fix writes them as most requests do; build prompts from one template file",
    without_spacing,
    is_safe=True,
)
CASE = Spelling(
    "near-identical prefix: case",
    "prefixes are equal but for upper and lower case",
    "by hand: write them in one way; case may carry meaning",
    str.casefold,
    is_safe=False,
)
