"""What the page says: questions to the ledger, their answers as tables, and what is drawn of them."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from hpckv.quantity import format_bytes, format_count
from hpckv.usage.columns import Column
from hpckv.usage.query import Accounts, Answer, Question, columns_of
from hpckv.usage.record import TIERS
from hpckv.usage.report.figures import BarFigure, Figure, MatrixFigure, Panel, Role, Series, TimeFigure, Unit, periods
from hpckv.usage.report.tables import Cell, Table, cell, clean, said, split, table_of, with_rest, without
from hpckv.usage.timespec import format_time

TOP = 12
"""Names in a figure and in the table under it; what is beyond them is one more, `others`."""
TOP_NARROW = 5
"""Users of a matrix on a narrow screen."""
_WHERE: tuple[tuple[str, Role], ...] = (
    ("device memory", "device"),
    ("host memory", "host"),
    ("local disk", "local"),
    ("shared store", "shared"),
    ("computed", "computed"),
)
_TIER_COLUMNS = [f"{tier.capitalize()}Tok" for tier in TIERS]


@dataclass(frozen=True)
class Section:
    """A heading, a figure and its table."""

    name: str
    """Of its PNG, and in the page's address."""
    title: str
    text: str
    figure: Figure
    alt: str
    """What the figure shows, for who does not see it."""
    table: Table
    narrow: Figure | None = None
    """Instead of `figure` on a narrow screen."""
    rest: Table | None = None
    """All rows, where `table` has the largest only."""
    rest_note: str = ""


@dataclass(frozen=True)
class Report:
    """All of it."""

    start: float
    end: float
    filters: Sequence[tuple[str, str]]
    sources: Sequence[str]
    facts: Sequence[tuple[Column, Cell]] = ()
    sections: Sequence[Section] = ()
    notes: Sequence[str] = ()
    command: str = ""
    definitions: Sequence[Column] = field(default=())


class Asker:
    """One question after the other, about the same records."""

    def __init__(self, accounts: Accounts, question: Question, flags: Sequence[str]) -> None:
        self._accounts, self._question, self._flags = accounts, question, list(flags)
        self.until = min(question.end, time.time())
        """Until when disk is paid for."""

    def ask(self, group: str, names: Sequence[str]) -> tuple[Answer, str]:
        """The answer, and the command that gives it too."""
        columns = columns_of(names, group)
        return self._accounts.ask(replace(self._question, group=group, columns=columns)), self.command(group, names)

    def command(self, group: str, names: Sequence[str]) -> str:
        return clean(shlex.join(["hpckv", "acct", *self._flags, "--group-by", group, "-o", ",".join(names)]))


def make_report(
    accounts: Accounts, question: Question, *, stores: Sequence[Path], runs: Sequence[Path], site: Path | None
) -> Report:
    """Everything that the page shows about the records that `question` selects; its group and columns are not used."""
    asker = Asker(accounts, question, question_flags(question, stores=stores, runs=runs, site=site))
    has_prices, has_disk_price = accounts.points.prices != [], accounts.points.disk_tb_day > 0
    report = Report(
        start=question.start,
        end=question.end,
        filters=_filters(question, accounts.name_of),
        sources=[clean(str(path)) for path in (*stores, *runs)],
    )
    span = accounts.ask(replace(question, group="project", columns=columns_of(["Start", "End"], "project")))
    if not span.rows:
        return report
    unit = period_of(max(question.start, min(row[0] for row in span.rows)), max(row[1] for row in span.rows))
    points = ["Points", "SavedPoints"] * has_prices
    disk = ["DiskPoints"] * has_disk_price
    facts = ["Requests", "PromptTok", "Hit%", "HitTok", "Computed", "OutTok", "GPUTime", "SavedGPU", *points]
    facts += ["StoreWritten", *disk]
    total, command = asker.ask("project", facts)
    sections = [
        _hits_over_time(asker, unit),
        _by_tier(asker),
        _by_name(asker, "user", "User", "Hits by user", points),
        _by_name(asker, "model", "Model", "Hits by model", points),
        _who_saved_whom(asker, points[1:]),
        _growth(asker, unit, accounts.points.disk_tb_day),
        _savings(asker, unit, has_prices=has_prices),
    ]
    notes = []
    shown = [*total.columns, *(column for section in sections if section for column in section.table.columns)]
    if total.unpriced:
        notes.append(f"{total.unpriced:,} records are of no price in the site file, and count 0 points.")
    return replace(
        report,
        facts=[(column, cell(value, column)) for column, value in zip(total.columns, total.total, strict=True)],
        sections=[section for section in sections if section is not None],
        notes=notes,
        command=command,
        definitions=list({column.name: column for column in shown}.values()),
    )


def question_flags(question: Question, *, stores: Sequence[Path], runs: Sequence[Path], site: Path | None) -> list[str]:
    """Of `hpckv acct`, that ask about the same records."""
    flags = [text for store in stores for text in ("--store", str(store))]
    flags += [text for run in runs for text in ("--run", str(run))]
    flags += ["--site", str(site)] if site else []
    flags += ["-S", format_time(question.start), "-E", format_time(question.end)]
    uids = [] if question.uids is None else [str(uid) for uid in question.uids]
    chosen = {"-u": uids, "-A": question.accounts, "-j": question.jobs, "-r": question.partitions}
    chosen |= {"--model": question.models, "--project": question.projects}
    return flags + [text for flag, given in chosen.items() if given for text in (flag, ",".join(given))]


def _filters(question: Question, name_of: Callable[[int], str]) -> list[tuple[str, str]]:
    users = [] if question.uids is None else [name_of(uid) for uid in question.uids]
    chosen = {"users": users, "accounts": question.accounts, "jobs": question.jobs, "partitions": question.partitions}
    chosen |= {"models": question.models, "projects": question.projects}
    return [(name, clean(", ".join(given))) for name, given in chosen.items() if given]


def period_of(first: float, last: float) -> str:
    """What bars stand for, that they are neither few nor thin: hours, days, weeks or months."""
    days = (last - first) / 86400
    return "hour" if days <= 2 else "day" if days <= 62 else "week" if days <= 2 * 365 else "month"


def _hits_over_time(asker: Asker, unit: str) -> Section:
    names = [unit.capitalize(), "Requests", "PromptTok", "HitTok", "Hit%", *_TIER_COLUMNS, "Computed"]
    answer, command = asker.ask(unit, names)
    line = _Timeline(answer, unit)
    hit = line.values("Hit%", missing=None)
    figure = line.figure(
        Panel("prompt tokens", "tokens", _by_where(line.values)),
        Panel("hit rate", "percent", [Series("Hit%", "line", hit)], "line"),
    )
    rates = [rate for rate in hit if rate is not None]
    span = f" The hit rate was between {min(rates):.1f} % and {max(rates):.1f} %." if rates else ""
    alt = (
        f"Bars of prompt tokens for each {unit}, {line.said}: found on the device, in host memory, on the local disk, "
    )
    alt += f"in the shared store, and computed; below them the hit rate.{span}"
    text = f"Prompt tokens of answered requests for each {unit}, by where they were found. What was not found was computed."
    return Section("hits-over-time", "Hits over time", text, figure, alt, table_of(answer, command))


def _by_tier(asker: Asker) -> Section:
    answer, command = asker.ask("project", [*_TIER_COLUMNS, "Computed", "PromptTok"])
    *counts, prompt = [value or 0 for value in answer.total]
    labels = [name for name, _ in _WHERE]
    parts = [100 * count / prompt if prompt else 0.0 for count in counts]
    series = [
        Series(label, role, [count if n == m else 0 for m in range(len(counts))])
        for n, ((label, role), count) in enumerate(zip(_WHERE, counts, strict=True))
    ]
    notes = [f"{format_count(count)}, {part:.1f} %" for count, part in zip(counts, parts, strict=True)]
    tokens, part_of = (
        Column("Tokens", "count", "", "prompt tokens"),
        Column("Part%", "percent", "", "of prompt tokens"),
    )
    columns = [
        Column("Where", "text", "", "where they were found"),
        Column("Column", "text", "", "of hpckv acct"),
        tokens,
        part_of,
    ]
    rows = [
        [said(label), said(column.name), cell(count, tokens), cell(part, part_of, None)]
        for label, column, count, part in zip(labels, answer.columns[:-1], counts, parts, strict=True)
    ]
    table = Table(columns, rows, [said("all"), said("PromptTok"), cell(prompt, tokens), said("")], command)
    alt = "Bars of prompt tokens by where they were found: "
    alt += "; ".join(f"{label} {note}" for label, note in zip(labels, notes, strict=True)) + "."
    text = "All prompt tokens of the window, by the tier they were found in."
    figure = BarFigure(labels, Panel("prompt tokens", "tokens", series), notes)
    return Section("hits-by-tier", "Hits by tier", text, figure, alt, table)


def _by_name(asker: Asker, group: str, key: str, title: str, points: Sequence[str]) -> Section:
    names = [key, "PromptTok", "HitTok", "Hit%", *_TIER_COLUMNS, "Computed", "SavedGPU", *points]
    if group == "model":
        names.insert(1, "ModelDigest")
    answer, command = asker.ask(group, names)
    labels = [clean(str(row[0] if row[0] is not None else "?")) for row in answer.rows]
    if group == "model":
        if len(set(labels)) < len(labels):
            labels = [f"{label} ({clean(str(row[1]))[:8]})" for label, row in zip(labels, answer.rows, strict=True)]
        else:  # then a model's name says which
            answer, command = (
                without(answer, ["ModelDigest"]),
                asker.command(group, [n for n in names if n != "ModelDigest"]),
            )
    top, others = split(answer, TOP)
    at = {column.name: n for n, column in enumerate(answer.columns)}
    shown = [*top, *([others] if others else [])]
    labels = [*labels[: len(top)], *([others[0]] if others else [])]
    notes = ["" if row[at["Hit%"]] is None else f"{row[at['Hit%']]:.0f} % hit" for row in shown]
    prompts = [row[at["PromptTok"]] or 0 for row in shown]
    has_long_others = others is not None and prompts[-1] > 2 * max(prompts[:-1])
    if has_long_others:  # its bar would leave nothing of the others'
        notes[-1] = f"{format_count(prompts[-1])} tokens, {notes[-1]}, no bar"

    def values(name: str) -> list[float | None]:
        return [0 if has_long_others and row is others else row[at[name]] or 0 for row in shown]

    figure = BarFigure(labels, Panel("prompt tokens", "tokens", _by_where(values)), notes)
    largest = f"{labels[0]} with {format_count(shown[0][at['HitTok']])} hit tokens, {notes[0] or 'no prompt'}"
    alt = f"Bars of prompt tokens of {len(labels)} {group}s, by where they were found; most hits: {largest}."
    text = f"Prompt tokens of each {group}, most hits first."
    table, rest, note = with_rest(answer, command, top, others, f"{group}s")
    return Section(f"hits-by-{group}", title, text, figure, alt, table, rest=rest, rest_note=note)


def _who_saved_whom(asker: Asker, points: Sequence[str]) -> Section | None:
    names = ["Writer", "Reader", "LoadedTok", "SavedGPU", *points]
    whole, _ = asker.ask("pair", [*names, "WriterUID", "ReaderUID"])
    if not whole.rows:
        return None
    answer = without(whole, ["WriterUID", "ReaderUID"])
    command = asker.command("pair", names)
    top, others = split(answer, TOP)
    table, rest, note = with_rest(answer, command, top, others, "pairs")
    loaded = sum(row[2] for row in whole.rows)
    by_others = sum(row[2] for row in whole.rows if row[-1] != row[-2])
    writer, reader, most = top[0][:3]
    alt = f"A matrix of tokens that were loaded from a store, by reader and by who had written them: {format_count(loaded)}, "
    alt += (
        f"{format_count(by_others)} of them from blocks of others. Most: {reader} {format_count(most)} from {writer}."
    )
    text = (
        "Tokens loaded from stored blocks: a row for who loaded them, a column for who had computed and stored them. "
    )
    text += "On the diagonal, outlined, everybody's own. A block that is loaded once and found again on the device is counted once."
    return Section(
        "who-saved-whom", "Who saved whom", text, _matrix(whole, TOP), clean(alt), table, _matrix(whole, TOP_NARROW), rest, note
    )  # fmt: skip


def _matrix(answer: Answer, count: int) -> MatrixFigure:
    """Of the users who loaded and were loaded from most."""
    names: dict[str, str] = {}
    weight: dict[str, int] = {}
    for writer, reader, tokens, *_, writer_uid, reader_uid in answer.rows:
        for name, uid in ((writer, writer_uid), (reader, reader_uid)):
            names[uid] = name
            weight[uid] = weight.get(uid, 0) + tokens
    ranked = sorted(weight, key=lambda uid: (-weight[uid], uid))
    place = {uid: min(n, count) for n, uid in enumerate(ranked)}
    size = min(len(ranked), count + 1)
    cells = [[0] * size for _ in range(size)]
    for _, _, tokens, *_, writer_uid, reader_uid in answer.rows:
        cells[place[reader_uid]][place[writer_uid]] += tokens
    labels = [clean(names[uid]) for uid in ranked[:count]] + [f"{len(ranked) - count} others"] * (len(ranked) > count)
    return MatrixFigure(labels, cells)


def _growth(asker: Asker, unit: str, disk_tb_day: float) -> Section:
    disk = ["DiskPoints"] * (disk_tb_day > 0)
    answer, command = asker.ask(unit, [unit.capitalize(), "WrittenTok", "StoreWritten", *disk])
    line = _Timeline(answer, unit)
    sums = _running([value or 0 for value in line.values("StoreWritten")])
    panels = [
        Panel(f"written in a {unit}", "bytes", [Series("StoreWritten", "shared", line.values("StoreWritten"))]),
        Panel("written since the window's start", "bytes", [Series("so far", "line", sums)], "line"),
    ]
    text = "Bytes of blocks written to the shared store. What was evicted since, and what was there before, is not in the ledger: "
    text += "hpckv store info says what a store holds now. "
    if disk:
        cost = accrued(
            line.starts[1:], line.values("StoreWritten"), line.values("DiskPoints"), asker.until, disk_tb_day
        )
        panels.append(Panel("what keeping it has cost by then", "points", [Series("cost", "line", cost)], "line"))
        text += f"The cost is at the site file's {disk_tb_day:g} points a TB and day, from when a block was written, as if none "
        text += "had been evicted: the most it can be. DiskPoints is what a row's blocks cost until the window's end."
    else:
        text += "The site file has no price of disk (points.disk_tb_day), so no cost is shown."
    so_far = Column("so far", "bytes", "", "StoreWritten of this and all rows above")
    by_row = _running([row[2] or 0 for row in answer.rows])
    plain = table_of(answer, command)
    rows = [[*row, cell(value, so_far, None)] for row, value in zip(plain.rows, by_row, strict=True)]
    table = Table([*plain.columns, so_far], rows, [*plain.total, Cell("")], command)
    alt = f"Bars of bytes written to the shared store for each {unit}, {line.said}, and their running sum, at the end "
    alt += f"{format_bytes(sums[-1])}."
    return Section("store-growth", "Growth of the store, and its price", text, line.figure(*panels), alt, table)


def _savings(asker: Asker, unit: str, *, has_prices: bool) -> Section:
    points = ["Points", "SavedPoints"] * has_prices
    what: Unit = "points" if has_prices else "GPU-hours"
    answer, command = asker.ask(unit, [unit.capitalize(), "GPUTime", "SavedGPU", *points])
    line = _Timeline(answer, unit)
    if has_prices:
        used, saved = line.values("Points"), line.values("SavedPoints")
        text = "What the GPUs' time cost, and what computing the hits again would have cost, less the time spent loading them."
    else:
        used, saved = line.values("GPUTime", per=3600), line.values("SavedGPU", per=3600)
        text = "The GPUs' time, and what computing the hits again would have taken, less the time spent loading them. "
        text += "The site file has no prices (points.prices), so savings are in GPU-hours."
    series = [Series("used", "computed", used), Series("saved", "device", saved)]
    sums = _running([value or 0 for value in saved])
    figure = line.figure(
        Panel("used and saved", what, series, "beside"),
        Panel("saved so far", what, [Series("saved", "line", sums)], "line"),
    )
    alt = f"Bars of {what} used and saved for each {unit}, {line.said}, and the running sum of what was saved, at the end "
    alt += f"{sums[-1]:,.4g}."
    return Section("savings", "Savings", text, figure, alt, table_of(answer, command))


def accrued(
    ends: Sequence[datetime],
    written: Sequence[float | None],
    points: Sequence[float | None],
    until: float,
    disk_tb_day: float,
) -> list[float]:
    """What was paid by the end of each period, of `points` that what was `written` in each costs until `until`."""
    paid, num_bytes, whole = [], 0.0, 0.0
    for end, more_bytes, more_points in zip(ends, written, points, strict=True):
        num_bytes, whole = num_bytes + (more_bytes or 0), whole + (more_points or 0)
        not_yet = max(0.0, until - end.timestamp()) / 86400
        paid.append(whole - num_bytes / 1e12 * not_yet * disk_tb_day)
    return paid


class _Timeline:
    """An answer by period, with the periods that have no records."""

    def __init__(self, answer: Answer, unit: str) -> None:
        self._rows = {row[0]: row for row in answer.rows}
        self._at = {column.name: n for n, column in enumerate(answer.columns)}
        self.labels, self.starts = periods(min(self._rows), max(self._rows), unit)
        self.said = self.labels[0] if len(self.labels) == 1 else f"{self.labels[0]} to {self.labels[-1]}"

    def values(self, name: str, *, missing: float | None = 0, per: float = 1) -> list[float | None]:
        at = self._at[name]
        found = [self._rows[label][at] if label in self._rows else missing for label in self.labels]
        return [None if value is None else value / per for value in found]

    def figure(self, *panels: Panel) -> TimeFigure:
        return TimeFigure(self.starts, self.labels, panels)


def _by_where(values: Callable[[str], Sequence[float | None]]) -> list[Series]:
    columns = [*_TIER_COLUMNS, "Computed"]
    return [Series(name, role, values(column)) for (name, role), column in zip(_WHERE, columns, strict=True)]


def _running(values: Sequence[float]) -> list[float]:
    sums, so_far = [], 0.0
    for value in values:
        so_far += value
        sums.append(so_far)
    return sums


def now_said(now: float) -> str:
    """A moment with its zone."""
    return datetime.fromtimestamp(now).astimezone().strftime("%Y-%m-%d %H:%M %Z")
