"""Answers as tables of a page: what is read, beside the number that `hpckv acct --json` says. Nothing here asks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpckv.quantity import format_bytes
from hpckv.usage.columns import Column
from hpckv.usage.query import Answer
from hpckv.usage.timespec import format_elapsed, format_time

LONGEST_LIST = 1000
"""Rows that are there to unfold."""

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""What no document may hold, and what would turn the words around it."""


def clean(text: str) -> str:
    """Text of a ledger as it may be shown."""
    return _UNPRINTABLE.sub("?", text)


@dataclass(frozen=True)
class Cell:
    """A value as it is read, and as `hpckv acct --json` says it (None: it does not)."""

    text: str
    raw: Any = None
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """Under a figure."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] = ()
    command: str = ""
    """That gives the same numbers."""


def split(answer: Answer, count: int) -> tuple[list[list[Any]], list[Any] | None]:
    """The first rows, and one of the sums of all others."""
    rows = answer.rows
    if len(rows) <= count + 1:  # a row `1 others` would say less than its own
        return rows, None
    at = {column.name: n for n, column in enumerate(answer.columns)}
    beyond = rows[count:]
    others: list[Any] = [
        None if column.kind == "text" else sum(row[n] or 0 for row in beyond) for n, column in enumerate(answer.columns)
    ]
    others[0] = f"{len(beyond)} others"
    if "Hit%" in at:
        prompt = others[at["PromptTok"]]
        others[at["Hit%"]] = 100.0 * others[at["HitTok"]] / prompt if prompt else None
    return rows[:count], others


def without(answer: Answer, names: Sequence[str]) -> Answer:
    """Fewer columns."""
    kept = [n for n, column in enumerate(answer.columns) if column.name not in names]
    rows = [[row[n] for n in kept] for row in answer.rows]
    return replace(answer, columns=[answer.columns[n] for n in kept], rows=rows, total=[answer.total[n] for n in kept])


def with_rest(
    answer: Answer, command: str, top: list[list[Any]], others: list[Any] | None, what: str
) -> tuple[Table, Table | None, str]:
    table = table_of(replace(answer, rows=top), command)
    if others is None:
        return table, None, ""
    # Their sums are this page's own: no row of `hpckv acct` says them.
    cells = [replace(cell(value, column), raw=None) for value, column in zip(others, answer.columns, strict=True)]
    shown = replace(table, rows=[*table.rows, cells])
    rest = table_of(replace(answer, rows=answer.rows[:LONGEST_LIST]), command)
    all_of = f"All {len(answer.rows):,} {what}"
    if len(answer.rows) > LONGEST_LIST:
        all_of = f"The first {LONGEST_LIST:,} of {len(answer.rows):,} {what}; the command below gives all"
    return shown, rest, all_of


def table_of(answer: Answer, command: str) -> Table:
    rows = [[cell(value, column) for value, column in zip(row, answer.columns, strict=True)] for row in answer.rows]
    total = [cell(value, column) for value, column in zip(answer.total, answer.columns, strict=True)]
    first = replace(total[0], text="all") if total[0].text == "" else total[0]
    return Table(answer.columns, rows, [first, *total[1:]] if len(rows) > 1 else (), command)


def said(text: str) -> Cell:
    """Words of the page's own."""
    return Cell(text, is_number=False)


def cell(value: Any, column: Column, *raw: Any) -> Cell:
    """`raw` is `value` unless it is given. Texts have none: what is read is what they say, as far as it may be shown."""
    text = _text(value, column.kind)
    if column.name == "ModelDigest":
        return Cell(text[:12], text, is_number=False)
    if column.kind == "text":
        return said(text)
    return Cell(text, raw[0] if raw else value)


def _text(value: Any, kind: str) -> str:
    if value is None or value == "":
        return ""
    match kind:
        case "text":
            return clean(str(value))
        case "elapsed":
            return format_elapsed(value)
        case "time":
            return format_time(value)
        case "percent":
            return f"{value:.1f}"
        case "bytes":
            return format_bytes(value)
        case "number":
            return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}"
