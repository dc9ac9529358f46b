"""Values that are new in every request - dates, times, ids, counters - and a text in which each is only named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\.?"
)
_WEEKDAY = r"(?:Mon(?:day)?|Tue(?:sday)?|Wed(?:nesday)?|Thu(?:rsday)?|Fri(?:day)?|Sat(?:urday)?|Sun(?:day)?)"
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d+)?)?(?:\s?[AaPp][Mm]\b)?(?:\s?(?:Z\b|UTC|GMT|[+-]\d{2}:?\d{2}))?"
_DATE = (
    rf"(?:\d{{4}}(?P<y>[-/.])\d{{1,2}}(?P=y)\d{{1,2}}|\d{{1,2}}(?P<d>[-/.])\d{{1,2}}(?P=d)\d{{2,4}}"
    rf"|\d{{1,2}}\.?\ {_MONTH}(?:,?\ \d{{4}})?|{_MONTH}\ \d{{1,2}}(?:st|nd|rd|th)?(?:,?\ \d{{4}})?)"
)
_VALUE = re.compile(
    rf"""(?<![A-Za-z0-9_])(?:
    (?P<timestamp>(?:{_WEEKDAY},?\ )?{_DATE}(?:[T,]?\ ?{_CLOCK})? | {_CLOCK} | 1[4-9]\d{{8}}(?:\d{{3}})?(?:\.\d+)? | {_WEEKDAY}
      | \d{{8}}T\d{{4,6}}Z?)
    | (?P<uuid>[0-9a-fA-F]{{8}}(?:-[0-9a-fA-F]{{4}}){{3}}-[0-9a-fA-F]{{12}})
    | (?P<token>(?=[A-Za-z_-]*\d)(?=[\d_-]*[A-Za-z])[A-Za-z0-9_-]{{16,}}={{0,2}})
    | (?P<id>(?=[A-Za-z_-]*\d)(?=[\d_-]*[A-Za-z])[A-Za-z0-9_-]+)
    | (?P<number>\d+(?:\.\d+)*)
    )(?![A-Za-z0-9_])""",
    re.VERBOSE,
)
_HINT = re.compile(r"\d|day\b|\b(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b")
"""What every value has; most text has none of it, and this is quick to see."""


def values_with_names(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, name) of every value in `text`, in order."""
    if _HINT.search(text):
        for found in _VALUE.finditer(text):
            yield found.start(), found.end(), str(found.lastgroup)


@lru_cache(maxsize=1 << 17)
def masked(text: str) -> str:
    """`text` with `<timestamp>`, `<uuid>`, `<token>`, `<id>` or 0 for every value; what is JSON stays JSON."""
    out, at = [], 0
    for start, end, name in values_with_names(text):
        out += [text[at:start], "0" if name == "number" else f"<{name}>"]
        at = end
    return "".join(out) + text[at:] if out else text


def values_of(text: str) -> tuple[str, ...]:
    """Every value in `text`, in order."""
    return tuple(text[start:end] for start, end, _ in values_with_names(text))
