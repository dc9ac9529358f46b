"""What is to be drawn, as plain numbers: bars over time, bars of names, a matrix. Nothing here draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

Unit = Literal["tokens", "bytes", "percent", "GPU-hours", "points"]
Role = Literal["device", "host", "local", "shared", "computed", "line"]
"""What a colour stands for, the same in every figure."""


@dataclass(frozen=True)
class Series:
    """Values of one kind, None where there are none."""

    name: str
    role: Role
    values: Sequence[float | None]


@dataclass(frozen=True)
class Panel:
    """Series on one pair of axes."""

    title: str
    unit: Unit
    series: Sequence[Series]
    kind: Literal["stacked", "beside", "line"] = "stacked"


@dataclass(frozen=True)
class TimeFigure:
    """Panels above each other, over the same periods."""

    starts: Sequence[datetime]
    """Of each period, local time, with none left out; the last entry is where the last one ends."""
    labels: Sequence[str]
    panels: Sequence[Panel]


@dataclass(frozen=True)
class BarFigure:
    """A bar for each name, from above."""

    names: Sequence[str]
    panel: Panel
    notes: Sequence[str]
    """At the end of each bar."""


@dataclass(frozen=True)
class MatrixFigure:
    """Tokens by reader (from above) and writer (from the left), the same users in the same order."""

    names: Sequence[str]
    cells: Sequence[Sequence[int]]


Figure = TimeFigure | BarFigure | MatrixFigure


def periods(first: str, last: str, unit: str) -> tuple[list[str], list[datetime]]:
    """All labels from `first` to `last` as the ledger's groups spell them, and where they start, with one more start as the end."""
    labels, starts = [], [_start(first)]
    while True:
        labels.append(_label(starts[-1], unit))
        starts.append(_next(starts[-1], unit))
        if labels[-1] >= last:
            return labels, starts


def _start(label: str) -> datetime:
    return datetime.fromisoformat({7: f"{label}-01", 13: f"{label}:00"}.get(len(label), label))


def _label(start: datetime, unit: str) -> str:
    return {"hour": f"{start:%FT%H}", "month": f"{start:%Y-%m}"}.get(unit, f"{start:%F}")


def _next(start: datetime, unit: str) -> datetime:
    if unit == "month":
        return (start + timedelta(days=31)).replace(day=1)
    return start + {"hour": timedelta(hours=1), "week": timedelta(days=7)}.get(unit, timedelta(days=1))
