"""Questions about the ledger: which records, grouped how, which columns - and the answer as plain numbers."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from hpckv.usage.columns import (
    BY_WRITER,
    COLUMNS,
    GROUPS,
    JOB,
    OF_WRITERS,
    PERIODS,
    WRITER_COLUMNS,
    Column,
    derived,
)
from hpckv.usage.gather import Gathered
from hpckv.usage.points import PointsConfig
from hpckv.usage.table import COLUMNS as TABLE
from hpckv.usage.table import connect

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True)
class Question:
    """What is asked; empty lists ask for everything."""

    start: float
    end: float
    """Records whose interval ended in [start, end), seconds since 1970."""
    group: str = "job"
    """One of `columns.GROUPS`."""
    columns: Sequence[Column] = ()
    uids: Sequence[int] | None = None
    """None is everybody."""
    accounts: Sequence[str] = ()
    jobs: Sequence[str] = ()
    """As 7, of an array with all its tasks, or 7_3."""
    partitions: Sequence[str] = ()
    models: Sequence[str] = ()
    projects: Sequence[str] = ()


@dataclass(frozen=True)
class Answer:
    """Rows in order of time, largest hits first where they are neither jobs nor periods; every value a text, a number or None."""

    columns: Sequence[Column]
    rows: list[list[Any]]
    total: list[Any]
    unpriced: int = 0
    """Records that no price of the site file fits."""


class Accounts:
    """A ledger, ready to be asked."""

    def __init__(self, found: Gathered, points: PointsConfig, name_of: Callable[[int], str]) -> None:
        """`name_of` is the system's list of users: what a ledger says about that is not believed."""
        self._found, self.points, self.name_of = found, points, name_of

    def ask(self, question: Question) -> Answer:
        """The rows and their total."""
        columns = question.columns or columns_of(GROUPS[question.group][1], question.group)
        grouping = GROUPS[question.group][0]
        wanted = ", ".join(column.sql for column in columns)
        order = _order(question.group)
        source = f"({OF_WRITERS})" if question.group in BY_WRITER else "rows"
        con = self._select(question, f"{wanted} {grouping} {order} {source}")
        rows = _rows(con, f"SELECT {wanted} FROM {source} GROUP BY {grouping} ORDER BY {order}, {grouping}")
        (total,) = _rows(con, f"SELECT {wanted} FROM {source}")
        ((unpriced,),) = _rows(con, "SELECT count(*) FROM rows WHERE price IS NULL") if self.points.prices else [[0]]
        is_summed = [column.kind not in ("text", "time") for column in columns]
        return Answer(
            columns, rows, [v if summed else "" for v, summed in zip(total, is_summed, strict=True)], unpriced
        )

    def _select(self, question: Question, asked: str) -> duckdb.DuckDBPyConnection:
        """A database with the table `rows`: the records that are asked about, with what the SQL `asked` needs."""
        price, values = self.points.price_sql
        where, given = _conditions(question)
        rows = derived(self.points.cache, asked)
        fields = _mentioned(f"{asked} {rows} uid t0 t1")
        con = connect(self._found, _mentioned(f"{' '.join(fields)} {price} {where}"))
        disk = f"{self.points.disk_tb_day!r}::DOUBLE / 1e12 * greatest(?::DOUBLE - t1, 0) / 86400 AS disk_price"
        con.execute(
            f"CREATE TABLE priced AS SELECT {', '.join(fields)}, {price} AS price, {disk} FROM records WHERE {where}",
            [*values, min(question.end, time.time()), *given],
        )
        if "names." in f"{asked} {rows}":
            self._learn_names(con, with_writers="writer_name" in asked)
        if "days." in rows:
            _learn_days(con, by_hour="days.hour" in rows)
        con.execute(f"CREATE VIEW rows AS {rows}")
        return con

    def _learn_names(self, con: duckdb.DuckDBPyConnection, *, with_writers: bool) -> None:
        uids = {uid for (uid,) in con.execute("SELECT DISTINCT uid FROM priced").fetchall()}
        if with_writers:
            keys = con.execute(
                "SELECT DISTINCT unnest(json_keys(by_writer)) FROM priced WHERE by_writer <> '{}'"
            ).fetchall()
            uids |= {int(key) for (key,) in keys if key.isdecimal()}
        con.execute("CREATE TABLE names (uid BIGINT, name VARCHAR)")
        for uid in sorted(uids):
            con.execute("INSERT INTO names VALUES (?, ?)", [uid, self.name_of(uid)])


def _rows(con: duckdb.DuckDBPyConnection, sql: str) -> list[list[Any]]:
    return [[_plain(value) for value in row] for row in con.execute(sql).fetchall()]


def _mentioned(sql: str) -> list[str]:
    """Of a record's fields."""
    words = set(re.findall(r"\w+", sql))
    return [name for name in TABLE if name in words]


def _learn_days(con: duckdb.DuckDBPyConnection, *, by_hour: bool) -> None:
    ((first, last),) = con.execute("SELECT min(t1), max(t1) FROM priced").fetchall()
    starts = [] if first is None else list(_starts(first, last, by_hour=by_hour))
    here = [datetime.fromtimestamp(start) for start in starts]
    con.execute(
        "CREATE TABLE days AS SELECT unnest(?::DOUBLE[]) AS start, unnest(?::VARCHAR[]) AS day, unnest(?::VARCHAR[]) AS hour",
        [starts, [f"{t:%F}" for t in here], [f"{t:%FT%H}" for t in here]],
    )


def columns_of(names: Sequence[str], group: str) -> list[Column]:
    """By their names, in any case; raises `KeyError` with the wrong one."""
    known = WRITER_COLUMNS if group in BY_WRITER else COLUMNS
    return [known[name.lower()] for name in names]


def _order(group: str) -> str:
    if group in PERIODS:
        return group
    return {"job": "min(t0)", "pair": "sum(tokens) DESC"}.get(group, "sum(hit_tokens) DESC")


def _starts(first: float, last: float, *, by_hour: bool) -> Iterator[float]:
    """Local midnights, from the one before `first` to the one before `last`; with `by_hour` all hours of these days."""
    day = datetime.fromtimestamp(first).replace(hour=0, minute=0, second=0, microsecond=0)
    while day.timestamp() <= last:
        following = (day + timedelta(hours=36)).replace(hour=0)  # not all days have 24 hours
        start, end = day.timestamp(), following.timestamp()
        yield from (start + 3600 * n for n in range(math.ceil((end - start) / 3600) if by_hour else 1))
        day = following


def _conditions(question: Question) -> tuple[str, list[Any]]:
    parts: list[str] = ["t1 >= ? AND t1 < ?"]
    values: list[Any] = [question.start, question.end]
    if question.uids is not None:
        parts.append("list_contains(?::BIGINT[], uid)")
        values.append(list(question.uids))
    for name in ("account", "partition", "model", "project"):
        if wanted := getattr(question, f"{name}s"):
            parts.append(f"list_contains(?::VARCHAR[], {name})")
            values.append(list(wanted))
    if question.jobs:
        jobs = f"list_contains(?::VARCHAR[], {JOB}) OR list_contains(?::VARCHAR[], job) OR list_contains(?::VARCHAR[], array_job)"
        parts.append(f"coalesce({jobs}, FALSE)")
        values += [list(question.jobs)] * 3
    return " AND ".join(parts), values


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
