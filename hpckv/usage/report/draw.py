"""Draws figures with matplotlib: once, as PNG and as SVG for a page. The only module that imports matplotlib."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import matplotlib as mpl
import matplotlib.dates as mdates
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from hpckv.quantity import format_count
from hpckv.usage.report.figures import BarFigure, Figure, MatrixFigure, Panel, Series, TimeFigure, Unit
from hpckv.usage.report.palette import HEAT, HEAT_INK, LIGHT

_INCHES_WIDE, _INCHES_NARROW = 9.4, 4.1
_LONGEST_NAME = 28
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")

Places = NDArray[np.float64]
Tips = dict[str, str]
"""What a part of a figure says when it is pointed at, by its id."""


def draw(figure: Figure, *, is_narrow: bool = False) -> tuple[Canvas, Tips]:
    """Raises nothing of its own; must be called and saved within `settings`."""
    tips: Tips = {}
    match figure:
        case TimeFigure():
            canvas = _over_time(figure, tips, is_narrow=is_narrow)
        case BarFigure():
            canvas = _by_name(figure, tips, is_narrow=is_narrow)
        case MatrixFigure():
            canvas = _matrix(figure, tips, is_narrow=is_narrow)
    return canvas, tips


@contextmanager
def settings() -> Iterator[None]:
    """matplotlib as it comes, whatever the user's own settings are, and with our colours."""
    own: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 9.0,
        "text.parse_math": False,  # a $ in a user's name is a $
        "text.color": LIGHT["ink"],
        "axes.labelcolor": LIGHT["ink"],
        "axes.titlecolor": LIGHT["ink"],
        "axes.edgecolor": LIGHT["frame"],
        "xtick.color": LIGHT["ink"],
        "ytick.color": LIGHT["ink"],
        "grid.color": LIGHT["grid"],
        "grid.linewidth": 0.6,
        "axes.grid": False,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.facecolor": "none",
        "figure.facecolor": LIGHT["paper"],
        "hatch.linewidth": 0.7,
        "svg.fonttype": "none",
        "svg.hashsalt": "hpckv",
        "date.epoch": "1970-01-01T00:00:00",
    }
    defaults: dict[Any, Any] = {name: value for name, value in mpl.rcParamsDefault.items() if name != "backend"}
    with mpl.rc_context({**defaults, **own}), warnings.catch_warnings():
        # The page's font draws what the one that measures has not; in a PNG it is a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def png(figure: Figure) -> bytes:
    """On light paper, whole."""
    with settings():
        canvas, _ = draw(figure)
        file = io.BytesIO()
        canvas.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


def _over_time(figure: TimeFigure, tips: Tips, *, is_narrow: bool) -> Canvas:
    count = len(figure.panels)
    heights = [2.6, *[1.5] * (count - 1)]
    canvas = Canvas(figsize=(_width(is_narrow), sum(heights) + 0.7), layout="constrained")
    all_axes = canvas.subplots(count, 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    edges = mdates.date2num(figure.starts)
    starts, widths = edges[:-1], edges[1:] - edges[:-1]
    for n, (axes, panel) in enumerate(zip(all_axes, figure.panels, strict=True)):
        scale, unit = _scale(panel)
        _dress(axes, panel.title + unit)
        draw_panel = {"stacked": _stacked, "beside": _beside, "line": _line}[panel.kind]
        draw_panel(axes, panel, starts, widths, scale)
        _value_axis(axes, panel)
        for series in panel.series:
            for m, value in enumerate(series.values):
                if value is not None:
                    tips[f"{n}-{series.role}-{m}"] = f"{figure.labels[m]}, {series.name}: {said(value, panel.unit)}"
    _legend(canvas, figure.panels[0].series, is_narrow=is_narrow)
    axes = all_axes[-1]
    pad = max(0.0, (8 - len(starts)) / 2) * widths[0]  # one day must not be a wall
    axes.set_xlim(edges[0] - pad - 0.2 * widths[0], edges[-1] + pad + 0.2 * widths[-1])
    _date_axis(axes, figure.starts, is_narrow=is_narrow)
    return canvas


def _date_axis(axes: Axes, starts: Sequence[datetime], *, is_narrow: bool) -> None:
    most = 4 if is_narrow else 9
    if len(starts) <= 2:  # one period: where it begins is all there is to say
        axes.set_xticks([mdates.date2num(starts[0])])
        is_hour = starts[1] - starts[0] < timedelta(days=1)
        axes.set_xticklabels([f"{starts[0]:%F %H:00}" if is_hour else f"{starts[0]:%F}"])
        return
    locator = mdates.AutoDateLocator(minticks=2, maxticks=most)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator))


def _stacked(axes: Axes, panel: Panel, starts: Places, widths: Places, scale: float) -> None:
    below = [0.0] * len(starts)
    for series in panel.series:
        heights = [(value or 0) / scale for value in series.values]
        bars = axes.bar(starts, heights, 0.92 * widths, bottom=below, align="edge", **_fill(series))
        _name_parts(bars, axes, series)
        below = [base + height for base, height in zip(below, heights, strict=True)]


def _beside(axes: Axes, panel: Panel, starts: Places, widths: Places, scale: float) -> None:
    part = 0.92 / len(panel.series)
    for n, series in enumerate(panel.series):
        heights = [(value or 0) / scale for value in series.values]
        bars = axes.bar(starts + n * part * widths, heights, part * widths, align="edge", **_fill(series))
        _name_parts(bars, axes, series)
    if any((value or 0) < 0 for series in panel.series for value in series.values):
        axes.axhline(0, color=LIGHT["frame"], linewidth=0.8)


def _line(axes: Axes, panel: Panel, starts: Places, widths: Places, scale: float) -> None:
    for series in panel.series:
        known = [
            (x, v / scale, n)
            for n, (x, v) in enumerate(zip(starts + widths / 2, series.values, strict=True))
            if v is not None
        ]
        axes.plot([x for x, _, _ in known], [v for _, v, _ in known], color=LIGHT[series.role], linewidth=1.4)
        for x, value, n in known:
            size = 3.5 if len(known) <= 40 else 2.0
            (dot,) = axes.plot([x], [value], "o", color=LIGHT[series.role], markersize=size)
            dot.set_gid(f"{_number(axes)}-{series.role}-{n}")


def _by_name(figure: BarFigure, tips: Tips, *, is_narrow: bool) -> Canvas:
    names = [shorten(name, 14 if is_narrow else _LONGEST_NAME) for name in figure.names]
    count = len(names)
    canvas = Canvas(figsize=(_width(is_narrow), 0.27 * count + (1.25 if is_narrow else 1.0)), layout="constrained")
    axes = canvas.subplots()
    scale, unit = _scale(figure.panel)
    _dress(axes, "")
    places, left = list(range(count)), [0.0] * count
    for series in figure.panel.series:
        lengths = [(value or 0) / scale for value in series.values]
        bars = axes.barh(places, lengths, 0.74, left=left, **_fill(series))
        _name_parts(bars, axes, series)
        left = [base + length for base, length in zip(left, lengths, strict=True)]
        for n, value in enumerate(series.values):
            tips[f"0-{series.role}-{n}"] = f"{figure.names[n]}, {series.name}: {said(value or 0, figure.panel.unit)}"
    # Room for each note behind its bar, and one that has no bar may use the whole width.
    longest, of_letter = max(left) or 1.0, 0.028 if is_narrow else 0.0115
    ends = [end / longest / (1 - min(0.8, of_letter * len(note))) for end, note in zip(left, figure.notes, strict=True)]
    axes.set_xlim(0, longest * max(1.02, *ends))
    for place, end, note in zip(places, left, figure.notes, strict=True):
        axes.text(end + longest * 0.008, place, note, va="center", fontsize=8.5)
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(3 if is_narrow else 6, integer=longest > 3))
    axes.xaxis.set_major_formatter(FuncFormatter(_ticked))
    axes.set_xlabel(figure.panel.title + unit)
    if len(set(figure.names)) != len(
        figure.panel.series
    ):  # where each bar is its own series, its name stands beside it
        _legend(canvas, figure.panel.series, is_narrow=is_narrow)
    return canvas


def _matrix(figure: MatrixFigure, tips: Tips, *, is_narrow: bool) -> Canvas:
    names = [shorten(name, 10 if is_narrow else 14) for name in figure.names]
    count = len(names)
    width = _width(is_narrow)
    canvas = Canvas(figsize=(width, 1.6 + 0.36 * count), layout="constrained")
    axes = canvas.subplots()
    for side in axes.spines.values():
        side.set_visible(False)
    largest = max(max(row) for row in figure.cells) or 1
    for y, row in enumerate(figure.cells):
        for x, tokens in enumerate(row):
            level = int((tokens / largest) ** 0.5 * (len(HEAT) - 1) + 0.999) if tokens else 0
            is_own = x == y and "others" not in figure.names[x]
            edge = LIGHT["ink"] if is_own else LIGHT["paper"]
            cell = Rectangle(
                (x + 0.03, y + 0.04), 0.94, 0.92, facecolor=LIGHT[HEAT[level]], edgecolor=edge, linewidth=1.1
            )
            cell.set_gid(f"0-cell-{y}-{x}")
            axes.add_patch(cell)
            tips[f"0-cell-{y}-{x}"] = f"{figure.names[y]} loaded {tokens:,} tokens written by {figure.names[x]}"
            if tokens:
                axes.text(
                    x + 0.5,
                    y + 0.5,
                    format_count(tokens),
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=LIGHT[HEAT_INK[level]],
                )
    columns = max(count, 4 if is_narrow else 8)  # a single user must not be a wall
    axes.set_xlim(0, columns)
    axes.set_ylim(count, 0)
    middles = [n + 0.5 for n in range(count)]
    axes.set_xticks(middles, names, rotation=45, ha="left", rotation_mode="anchor")
    axes.set_yticks(middles, names)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.set_ylabel("reader")
    axes.set_title("written by", fontsize=9)
    return canvas


def _width(is_narrow: bool) -> float:
    return _INCHES_NARROW if is_narrow else _INCHES_WIDE


def _dress(axes: Axes, title: str) -> None:
    if title:
        axes.set_title(title)
        axes.grid(axis="y")


def _scale(panel: Panel) -> tuple[float, str]:
    """What values are divided by, and how that is said behind the title."""
    if panel.unit != "bytes":
        return 1.0, {"tokens": "", "percent": ", %"}.get(panel.unit, f", {panel.unit}")
    largest = max((abs(value or 0) for series in panel.series for value in series.values), default=0)
    power = 0
    while power + 1 < len(_BYTES) and largest >= 1024 ** (power + 1):
        power += 1
    return 1024.0**power, f", {_BYTES[power]}"


def _value_axis(axes: Axes, panel: Panel) -> None:
    if panel.unit == "percent":
        axes.set_ylim(-3, 103)
        axes.set_yticks([0, 50, 100])
        return
    values = [value or 0 for series in panel.series for value in series.values]
    if not any(values):
        axes.set_ylim(0, 1)
        axes.set_yticks([0])
        return
    axes.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    axes.yaxis.set_major_formatter(FuncFormatter(_ticked) if panel.unit == "tokens" else plain)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.0, low) if min(values) < 0 else 0.0, high if max(values) > 0 else 0.0)


def _ticked(value: float, _: object) -> str:
    """1250000000 -> 1.25G: what is rounded would stand in the wrong place."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{value:g}{unit}"
        value /= 1000
    return f"{value:g}T"


def _fill(series: Series) -> dict[str, Any]:
    """Computed tokens are hatched: what was not found must be told from what was also without colours."""
    style: dict[str, Any] = {"facecolor": LIGHT[series.role], "edgecolor": LIGHT["paper"], "linewidth": 0.5}
    if series.role == "computed":
        style |= {"hatch": "/////", "edgecolor": LIGHT["hatch"]}
    return style


def _name_parts(bars: Sequence[Patch], axes: Axes, series: Series) -> None:
    for n, bar in enumerate(bars):
        bar.set_gid(f"{_number(axes)}-{series.role}-{n}")


def _number(axes: Axes) -> int:
    assert isinstance(axes.figure, Canvas)
    return axes.figure.axes.index(axes)


def _legend(canvas: Canvas, series: Sequence[Series], *, is_narrow: bool) -> None:
    if len(series) < 2:
        return
    handles = [Patch(label=one.name, **_fill(one)) for one in series]
    columns = 2 if is_narrow and len(handles) > 2 else len(handles)
    canvas.legend(
        handles=handles, loc="outside upper left", ncols=columns, frameon=False, handlelength=1.3, columnspacing=1.4
    )


def shorten(name: str, longest: int) -> str:
    """With an ellipsis in the middle: names of models differ at both ends."""
    if len(name) <= longest:
        return name
    tail = longest // 3
    return f"{name[: longest - tail - 1]}…{name[-tail:]}"


def said(value: float, unit: Unit) -> str:
    """A value in a tip, whole where it is whole."""
    match unit:
        case "tokens":
            return f"{value:,.0f} tokens"
        case "bytes":
            return f"{value:,.0f} bytes"
        case "percent":
            return f"{value:.1f} %"
    return f"{value:,.4g} {unit}"
