"""The report as one HTML page that needs nothing else, and its figures as PNGs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.resources import files

import jinja2
from markupsafe import Markup

from hpckv.usage.gather import Gathered
from hpckv.usage.report.draw import draw, png, settings
from hpckv.usage.report.palette import DARK, LIGHT
from hpckv.usage.report.sections import Report, Section, now_said
from hpckv.usage.report.svg import inline_svg
from hpckv.usage.report.tables import clean

_MOST_ODDITIES = 100


def render_page(report: Report, found: Gathered, *, version: str, now: float | None = None) -> str:
    """HTML. All that a ledger says is escaped by the template; drawings escape it themselves."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_packaged("page.html"))
    where = ", ".join(source.rstrip("/").rpartition("/")[2] for source in report.sources)
    return template.render(
        title=f"Cache accounting of {where}",
        window=window_said(report),
        generated=now_said(time.time() if now is None else now),
        version=version,
        num_files=found.num_files,
        num_months=len(found.months),
        report=report,
        drawings=dict(_drawings(report.sections)),
        oddities=[(clean(str(oddity.path)), clean(oddity.what)) for oddity in found.oddities],
        most_oddities=_MOST_ODDITIES,
        light=LIGHT,
        dark=DARK,
        css=Markup(_packaged("page.css")),
    )


def render_pngs(report: Report) -> Iterator[tuple[str, bytes]]:
    """Name and content of a file for each figure."""
    for section in report.sections:
        yield f"{section.name}.png", png(section.figure)


def window_said(report: Report) -> str:
    """From when until when, in local time, with the zone."""
    start, end = (datetime.fromtimestamp(t).astimezone() for t in (report.start, report.end))
    return f"{start:%F %T} to {end:%F %T} ({end:%Z})"


def _drawings(sections: Sequence[Section]) -> Iterator[tuple[tuple[str, str], Markup]]:
    with settings():
        for section in sections:
            for width, figure in (("wide", section.figure), ("narrow", section.narrow or section.figure)):
                canvas, tips = draw(figure, is_narrow=width == "narrow")
                name = f"{section.name}-{width}"
                svg = inline_svg(canvas, tips, name=name, title=section.title, alt=section.alt)
                yield (section.name, width), Markup(svg)


def _packaged(name: str) -> str:
    return (files("hpckv.usage.report") / name).read_text(encoding="utf-8")
