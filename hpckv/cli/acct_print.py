"""How `hpckv acct` prints an answer: as `sacct` does, as JSON, as CSV."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from hpckv.errors import ConfigError
from hpckv.quantity import format_bytes

if TYPE_CHECKING:
    from hpckv.usage.columns import Column
    from hpckv.usage.ledger import Oddity
    from hpckv.usage.query import Answer


@dataclass(frozen=True)
class Form:
    """How it was asked to be printed."""

    has_header: bool = True
    is_json: bool = False
    is_csv: bool = False
    is_parsable: bool = False
    ends_lines: bool = False
    delimiter: str = "|"
    units: str | None = None

    @property
    def is_table(self) -> bool:
        return not (self.is_json or self.is_csv or self.is_parsable)


def print_answer(answer: Answer, widths: Sequence[int | None], form: Form, oddities: Sequence[Oddity] = ()) -> None:
    """In that form."""
    if form.is_json:
        print_json(answer, oddities)
    elif form.is_csv:
        print_csv(answer, has_header=form.has_header)
    elif form.is_parsable:
        ends_lines, has_header = form.ends_lines, form.has_header
        print_parsable(answer, form.delimiter, form.units, ends_lines=ends_lines, has_header=has_header)
    else:
        print_table(answer, widths, form.units, has_header=form.has_header)


_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def print_definitions(known: Mapping[str, Column]) -> None:
    """Every column, and what it means."""
    for column in known.values():
        typer.echo(f"{column.name:<12} {column.definition}")


def print_json(answer: Answer, oddities: Sequence[Oddity]) -> None:
    """Raw numbers, and what was left out."""
    names = [column.name for column in answer.columns]
    columns = {c.name: {"kind": c.kind, "definition": c.definition} for c in answer.columns}
    rows = [dict(zip(names, row, strict=True)) for row in answer.rows]
    total = {name: value for name, value in zip(names, answer.total, strict=True) if value != ""}
    left_out = [{"file": str(oddity.path), "what": oddity.what} for oddity in oddities]
    whole = {
        "columns": columns,
        "rows": rows,
        "total": total,
        "unpriced_records": answer.unpriced,
        "oddities": left_out,
    }
    typer.echo(json.dumps(whole))


def print_csv(answer: Answer, *, has_header: bool) -> None:
    """Raw numbers."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if has_header:
        writer.writerow([column.name for column in answer.columns])
    writer.writerows(answer.rows)


def print_parsable(answer: Answer, delimiter: str, units: str | None, *, ends_lines: bool, has_header: bool) -> None:
    """`-P`, or with `ends_lines` `-p`."""
    header = [[column.name for column in answer.columns]] if has_header else []
    for line in header + [_texts(answer, row, units) for row in answer.rows]:
        typer.echo(delimiter.join(line) + (delimiter if ends_lines else ""))


def print_table(answer: Answer, widths: Sequence[int | None], units: str | None, *, has_header: bool) -> None:
    """As `sacct`: text beyond a width that was asked for is cut with a +, and left-aligned if that is negative. With a total."""
    header = [column.name for column in answer.columns]
    lines = [_texts(answer, row, units) for row in answer.rows]
    total = _texts(answer, answer.total, units)
    asked = widths or [None] * len(header)
    found = [abs(w) if w else max(len(row[n]) for row in (header, total, *lines)) for n, w in enumerate(asked)]
    is_left = [w < 0 if w else column.kind == "text" for w, column in zip(asked, answer.columns, strict=True)]

    def show(row: Sequence[str]) -> None:
        cells = [cell if len(cell) <= w else cell[: w - 1] + "+" for cell, w in zip(row, found, strict=True)]
        padded = [c.ljust(w) if left else c.rjust(w) for c, w, left in zip(cells, found, is_left, strict=True)]
        typer.echo(" ".join(padded).rstrip())

    rule = ["-" * width for width in found]
    for line in (
        ([header, rule] if has_header else []) + lines + ([rule, total] if has_header and len(lines) > 1 else [])
    ):
        show(line)


def _texts(answer: Answer, row: Sequence[Any], units: str | None) -> list[str]:
    return [_text(value, column.kind, units) for value, column in zip(row, answer.columns, strict=True)]


def _text(value: Any, kind: str, units: str | None) -> str:
    from hpckv.usage.timespec import format_elapsed, format_time

    if value is None or value == "":
        return ""
    match kind:
        case "text":
            return re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", str(value))  # a terminal must not obey what a ledger says
        case "elapsed":
            return format_elapsed(value)
        case "time":
            return format_time(value)
        case "percent":
            return f"{value:.1f}"
        case "number":
            return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
        case "bytes":
            return _in_units(value, units, 1024) if units else format_bytes(value)
    return _in_units(value, units, 1000) if units else str(value)


def _in_units(value: float, units: str, base: int) -> str:
    letter = units.upper()
    if letter not in _UNITS:
        raise ConfigError(f"--units {units}: expected one of {', '.join(_UNITS)}")
    return f"{value / base ** _UNITS[letter]:.2f}{letter}"
