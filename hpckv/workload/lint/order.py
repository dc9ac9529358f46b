"""Static text behind dynamic text: what many prompts have belongs before what few have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

from hpckv.workload.lint.embedded import has_same_values
from hpckv.workload.lint.masks import masked
from hpckv.workload.lint.prompts import Message, Prompt, Repaired, Spot, paragraphs

_LONG = 80
"""Characters of a part that is worth moving."""
_POINTS = re.compile(
    r"\b(?:above|below|following|follows|preceding|previous|next|aforementioned|earlier|later|former|latter|now|then)\b",
    re.IGNORECASE,
)
"""Words by which a text says where it stands among others."""
_INSTRUCTING = ("system", "developer")


class Commonness:
    """How many wholes have a part. Dates and numbers do not make it another part, unless it is to be moved."""

    def __init__(self, wholes: Sequence[Sequence[str]], num_prompts: int) -> None:
        """`wholes` are the parts of each message, or the messages of each prompt that may be moved."""
        self._as_written = Counter(part for parts in wholes for part in set(parts) if len(part) >= _LONG)
        self._least = max(3, num_prompts // 50)
        self._masked: Counter[str] = Counter()
        for parts in wholes:
            if len(parts) > 1 and any(self._is_static(part) for part in parts):
                self._masked.update({masked(part) for part in parts})

    def _is_static(self, part: str) -> bool:
        return self._as_written.get(part, 0) >= self._least

    def static_first(self, parts: Sequence[str]) -> list[int] | None:
        """The order that has long static parts before those that at most half as many prompts have; None if it is this one."""
        most = max((self._as_written[part] for part in parts if self._is_static(part)), default=0)
        if not most or len(parts) < 2:
            return None
        seen = (max(self._as_written.get(part, 0), self._masked[masked(part)]) for part in parts)
        first = next((n for n, count in enumerate(seen) if 2 * count <= most), len(parts))
        static = [n for n in range(first, len(parts)) if 2 * self._as_written.get(parts[n], 0) > most]
        if not static or static[-1] == first + len(static) - 1:
            return None
        rest = set(range(first, len(parts))).difference(static)
        return [*range(first), *static, *sorted(rest)]


class StaticAfterDynamic:
    """Static text behind dynamic text. What is safe moves whole paragraphs within a message and system messages among
    themselves; the other one moves the rest: lines, messages of any role, text that says where it stands.
    """

    what = "text that many requests have stands behind text that few have"

    def __init__(self, *, is_safe: bool) -> None:
        self.is_safe = is_safe
        self.kind = "static after dynamic" + ("" if is_safe else ": by hand")
        self.remedy = (
            "--fix moves whole paragraphs and system messages; in templates put what never changes first"
            if is_safe
            else "by hand: put what never changes first; moving it here could change what is said"
        )

    def repair(self, prompts: Sequence[Prompt]) -> Repaired:
        """Prompts with static parts first."""
        parts = Commonness([_parts(message.text)[0] for prompt in prompts for message in prompt.messages], len(prompts))
        whole = Commonness([self._movable(prompt) for prompt in prompts], len(prompts))
        repaired = Repaired(list(prompts))
        for index, prompt in enumerate(prompts):
            spots: list[Spot] = []
            messages = [self._message(prompt, number, parts, spots) for number in range(len(prompt.messages))]
            after = prompt.with_messages(self._messages(prompt, messages, whole, spots)) if messages else prompt
            if spots:
                repaired.put(index, after, spots[0])
        return repaired

    def _message(self, prompt: Prompt, number: int, common: Commonness, spots: list[Spot]) -> Message:
        message = prompt.messages[number]
        parts, gaps = _parts(message.text)
        order = common.static_first(parts)
        if order is None:
            return message
        after = message._replace(text="".join(parts[n] + gap for n, gap in zip(order, [*gaps, ""], strict=True)))
        is_safe = _are_paragraphs(gaps) and _may_move(parts, order) and has_same_values(_alone(message), _alone(after))
        if is_safe != self.is_safe:
            return message
        moved = _first_moved(order)
        character = 1 + sum(map(len, parts[:moved])) + sum(map(len, gaps[:moved]))
        spots.append(Spot(prompt.number, number + 1, character, parts[moved]))
        return after

    def _messages(
        self, prompt: Prompt, messages: list[Message], common: Commonness, spots: list[Spot]
    ) -> list[Message]:
        texts = self._movable(prompt)
        order = common.static_first(texts)
        if order is None:
            return messages
        others = max(place for place, n in enumerate(order) if n != place) >= _num_leading(prompt)
        if self.is_safe != (not others and _may_move(texts, order)):
            return messages
        moved = _first_moved(order)
        spots.append(Spot(prompt.number, moved + 1, 1, texts[moved]))
        return [*(messages[n] for n in order), *messages[len(order) :]]

    def _movable(self, prompt: Prompt) -> list[str]:
        """Texts of the first messages, as many as may be moved: what is asked stays last."""
        num = _num_leading(prompt) if self.is_safe else len(prompt.messages) - 1
        return [message.text for message in prompt.messages[: max(0, num)]]


def _num_leading(prompt: Prompt) -> int:
    return len(list(takewhile(lambda message: message.role in _INSTRUCTING, prompt.messages)))


def _alone(message: Message) -> Prompt:
    return Prompt(0, "", (message,))


def _parts(text: str) -> tuple[list[str], list[str]]:
    """Paragraphs, or lines where no line is blank, and what separates them."""
    parts, gaps = paragraphs(text)
    if gaps:
        return parts, gaps
    lines = text.split("\n")
    return lines, ["\n"] * (len(lines) - 1)


def _are_paragraphs(gaps: Sequence[str]) -> bool:
    return all(gap.count("\n") > 1 for gap in gaps)


def _first_moved(order: Sequence[int]) -> int:
    return next(n for place, n in enumerate(order) if n != place)


def _may_move(parts: Sequence[str], order: Sequence[int]) -> bool:
    """Whether each part says the same in its new place: none points to another, opens a list, or is cut code or markup."""
    moved = [n for place, n in enumerate(order) if n > place]
    return not any(
        _POINTS.search(parts[n]) or parts[n - 1].rstrip().endswith(":") or parts[n].rstrip().endswith(":")
        for n in moved
    ) and not any("```" in part or part.lstrip().startswith("<") for part in parts)
