"""JSON inside prompts: the same object with its keys in another order, or other white space between them."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from hpckv.workload.lint.masks import masked
from hpckv.workload.lint.prompts import KEPT_TEXTS, Prompt, Repaired, Spot

_BEGIN = re.compile(r'\{\s*"|\[\s*[\[{"\d-]')
_LEAST = 12
"""Characters of a value that is worth looking at."""
_MOST_READ = 4
"""Times the length of a text that is read at most in search of JSON: broken JSON inside broken JSON costs no more."""


class Value(NamedTuple):
    """One JSON object or array in a text."""

    start: int
    end: int
    canonical: str


def canonical(value: Any) -> str:
    """Sorted keys, `, ` and `: ` between things, no line breaks; raises `ValueError` for what has no such form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


def _exact(number: str) -> float:
    if len(number) > 16:
        raise ValueError(f"{number} may not survive being a float")
    return float(number)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


_DECODER = json.JSONDecoder(parse_float=_exact, object_pairs_hook=_object)


@lru_cache(KEPT_TEXTS)
def values_in(text: str) -> tuple[Value, ...]:
    """Outermost JSON objects and arrays of a text that can be written anew without loss."""
    return tuple(_values(text))


def _values(text: str) -> Iterator[Value]:
    at, left = 0, _MOST_READ * len(text)
    while left > 0 and (begin := _BEGIN.search(text, at)):
        start = begin.start()
        try:
            value, end = _DECODER.raw_decode(text, start)
            written = canonical(value)
        except json.JSONDecodeError as error:
            at, left = start + 1, left - (error.pos - start)
        except (ValueError, RecursionError):  # also half a surrogate pair
            at, left = start + 1, left - (len(text) - start)
        else:
            at, left = end, left - (end - start)
            if end - start >= _LEAST:
                yield Value(start, end, written)


def rewritten(text: str) -> str:
    """`text` with every value canonical."""
    for value in reversed(values_in(text)):
        text = text[: value.start] + value.canonical + text[value.end :]
    return text


def has_same_values(before: Prompt, after: Prompt) -> bool:
    """Whether two forms of a request hold the same JSON values, in any order."""
    return _value_counts(before) == _value_counts(after)


def _value_counts(prompt: Prompt) -> Counter[str]:
    return Counter(value.canonical for message in prompt.messages for value in values_in(message.text))


class UnorderedJson:
    """Values that are equal, or equal but for dates and numbers, and are not written alike, become canonical."""

    kind = "unordered JSON"
    what = "JSON objects that other requests have too are written with their keys in another order or other white space"
    remedy = "--fix writes them canonically; json.dumps(value, sort_keys=True) wherever prompts are built"
    is_safe = True

    def repair(self, prompts: Sequence[Prompt]) -> Repaired:
        """Prompts in which every such value is written in one way."""
        forms: dict[str, set[str]] = defaultdict(set)
        for text in {message.text for prompt in prompts for message in prompt.messages}:
            for value in values_in(text):
                forms[masked(value.canonical)].add(masked(text[value.start : value.end]))
        for fields in {message.fields for prompt in prompts for message in prompt.messages if message.fields}:
            forms[masked(canonical(json.loads(fields)))].add(masked(fields))
        unstable = {form for form, written in forms.items() if len(written) > 1}
        repaired = Repaired(list(prompts))
        if unstable:
            for index, prompt in enumerate(prompts):
                self._repair_one(index, prompt, unstable, repaired)
        return repaired

    def _repair_one(self, index: int, prompt: Prompt, unstable: set[str], repaired: Repaired) -> None:
        messages, spots = list(prompt.messages), []
        for number, message in enumerate(prompt.messages):
            text = message.text
            for value in reversed(values_in(text)):
                raw = text[value.start : value.end]
                if raw != value.canonical and masked(value.canonical) in unstable:
                    text = text[: value.start] + value.canonical + text[value.end :]
                    spots.append(Spot(prompt.number, number + 1, value.start + 1, raw))
            fields = message.fields and canonical(json.loads(message.fields))
            if fields != message.fields and masked(fields) in unstable:
                spots.append(Spot(prompt.number, number + 1, 1, message.fields))
                message = message._replace(fields=fields)
            messages[number] = message._replace(text=text)
        after = prompt.with_messages(messages)
        if spots and has_same_values(prompt, after):
            repaired.put(index, after, min(spots))
