"""Few-shot examples and documents that are the same in several prompts and stand in different orders."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from hpckv.workload.lint.prompts import KEPT_TEXTS, Message, Prompt, Repaired, Spot, paragraphs

_LABEL = re.compile(r"\s*[\[(#*-]*\s*(?:[A-Z]\w*\s+)?#?\d+\s*[\]).:]+\s*")
"""`1.`, `[1]`, `Document 3:` before an example: stays where it is."""
Body = tuple[str, ...] | tuple[Message, ...]


class Piece(NamedTuple):
    """A paragraph, or a user's message with the assistant's answer, and where it stands."""

    body: Body
    label: str
    message: int
    character: int


class ExampleOrder:
    """The same examples or documents in another order: paragraphs of a message, or pairs of user and assistant messages."""

    kind = "order of examples"
    what = "the same examples or documents stand in another order than in other requests"
    remedy = "by hand: sort them by something fixed, such as their id; models do weigh what stands last"
    is_safe = False

    def repair(self, prompts: Sequence[Prompt]) -> Repaired:
        """Prompts in which equal sets of examples stand in the order that most have."""
        split = [list(_pieces(prompt)) for prompt in prompts]
        counts = Counter(body for pieces in split for body in {piece.body for piece in pieces})
        runs = [(index, run) for index, pieces in enumerate(split) for run in _runs(pieces, counts)]
        orders: dict[tuple[Body, ...], Counter[tuple[Body, ...]]] = defaultdict(Counter)
        for index, run in runs:
            bodies = _bodies(split[index], run)
            orders[tuple(sorted(bodies))][bodies] += 1
        repaired = Repaired(list(prompts))
        for index, run in runs:
            pieces = split[index]
            bodies = _bodies(pieces, run)
            found = orders[tuple(sorted(bodies))]
            usual = min(found, key=lambda order: (-found[order], order))
            if usual == bodies:
                continue
            first = next(n for n, body in zip(run, usual, strict=True) if pieces[n].body != body)
            moved = pieces[first]
            for n, body in zip(run, usual, strict=True):
                pieces[n] = pieces[n]._replace(body=body)
            text = moved.body[0].text if isinstance(moved.body[0], Message) else moved.body[0]
            spot = Spot(prompts[index].number, moved.message + 1, moved.character + 1, text)
            repaired.put(index, _joined(prompts[index], pieces), spot)
        return repaired


def _pieces(prompt: Prompt) -> Iterator[Piece]:
    roles = [message.role for message in prompt.messages]
    pairs = [n for n in range(len(roles) - 1) if roles[n : n + 2] == ["user", "assistant"]]
    if len(pairs) > 1:
        for n in pairs:
            yield Piece(prompt.messages[n : n + 2], "", n, 0)
        return
    for number, message in enumerate(prompt.messages):
        at = 0
        for label, part, length in _labelled(message.text):
            yield Piece((part,), label, number, at)
            at += length


@lru_cache(KEPT_TEXTS)
def _labelled(text: str) -> list[tuple[str, str, int]]:
    """Of each paragraph its label, the rest, and the characters to the next one."""
    out = []
    parts, gaps = paragraphs(text)
    for part, gap in zip(parts, [*gaps, ""], strict=True):
        found = _LABEL.match(part)
        label = found[0] if found else ""
        out.append((label, part[len(label) :], len(part) + len(gap)))
    return out


def _runs(pieces: Sequence[Piece], counts: Counter[Body]) -> Iterator[list[int]]:
    """Neighbouring pieces that other prompts have too, in one message where they are paragraphs."""

    def place(n: int) -> tuple[bool, int]:
        is_pair = isinstance(pieces[n].body[0], Message)
        return counts[pieces[n].body] > 1, -1 if is_pair else pieces[n].message

    for (is_common, _), group in groupby(range(len(pieces)), place):
        run = list(group)
        if is_common and len(run) > 1:
            yield run


def _bodies(pieces: Sequence[Piece], run: Sequence[int]) -> tuple[Body, ...]:
    return tuple(pieces[n].body for n in run)


def _joined(prompt: Prompt, pieces: Sequence[Piece]) -> Prompt:
    messages = list(prompt.messages)
    texts: dict[int, list[str]] = defaultdict(list)
    for piece in pieces:
        if isinstance(piece.body[0], Message):
            messages[piece.message : piece.message + 2] = [part for part in piece.body if isinstance(part, Message)]
        else:
            texts[piece.message].append(piece.label + piece.body[0])
    for number, parts in texts.items():
        gaps = [*paragraphs(messages[number].text)[1], ""]
        text = "".join(part + gap for part, gap in zip(parts, gaps, strict=True))
        messages[number] = messages[number]._replace(text=text)
    return prompt.with_messages(messages)
