"""Records as a DuckDB table, from memory and from rolled-up months: what every question is asked of."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import msgspec

from hpckv.usage.gather import Gathered
from hpckv.usage.months import new_database
from hpckv.usage.record import TIERS, Record

if TYPE_CHECKING:
    import duckdb

_json = msgspec.json.Encoder().encode
Get = Callable[[Iterable[Record]], Iterable[Any]]


def _field(name: str) -> Get:
    return partial(map, attrgetter(name))


def _part(name: str, tier: str) -> Get:
    mappings = _field(name)
    return lambda records: (mapping.get(tier, 0) for mapping in mappings(records))


_KINDS = {str: "VARCHAR", str | None: "VARCHAR", int: "BIGINT", int | None: "BIGINT", float: "DOUBLE"}
_UNKNOWN = "energy_j"
"""A number that may be unknown: NaN in an array, NULL in the table."""
_PARTS = {"cached": TIERS, "read_bytes": TIERS[1:], "written_bytes": TIERS[1:]}
COLUMNS: dict[str, tuple[str, Get]] = {
    **{f.name: (_KINDS[f.type], _field(f.name)) for f in msgspec.structs.fields(Record) if f.type in _KINDS},
    **{f"{name}_{tier}": ("BIGINT", _part(name, tier)) for name, tiers in _PARTS.items() for tier in tiers},
    "array_task": ("BIGINT", lambda records: (-1 if r.array_task is None else r.array_task for r in records)),
    _UNKNOWN: ("DOUBLE", lambda records: (math.nan if r.energy_j is None else r.energy_j for r in records)),
    "by_writer": ("VARCHAR", lambda records: (_json(r.by_writer).decode() for r in records)),
}
"""Type, and records' values."""


def connect(found: Gathered, columns: Collection[str] = COLUMNS.keys()) -> duckdb.DuckDBPyConnection:
    """A database with the view `records`, each `(writer, seq)` once: the writer's own before one written afterwards.

    It has those of a record's fields that are in `columns`; beside them `file`, the ledger file's name, and `is_after`.
    Rolled-up months are read when they are asked about, and of them only what is.
    """
    con = new_database()
    months = [str(month.path) for month in found.months]
    has_afterwards = any(is_after for _, _, is_after in found.records) or (
        months and con.execute("SELECT count(*) FROM read_parquet(?) WHERE is_after", [months]).fetchall() != [(0,)]
    )
    needed = {*columns, "writer", "seq"} if has_afterwards else {*columns}
    names = ", ".join([*(name for name in COLUMNS if name in needed), "file", "is_after"])
    con.execute(f"CREATE TABLE fresh ({', '.join(f'{name} {kind}' for name, kind in _types(needed).items())})")
    if found.records:
        con.register("batch", _arrays(found.records, needed))
        given = names.replace(_UNKNOWN, f"nullif({_UNKNOWN}, 'nan'::DOUBLE) AS {_UNKNOWN}")
        con.execute(f"INSERT INTO fresh SELECT {given} FROM batch")
        con.unregister("batch")
    con.execute("CREATE TABLE stale (path VARCHAR, file VARCHAR)")
    parts = [f"SELECT {names} FROM fresh"]
    for month in found.months:
        path = quoted(str(month.path))
        con.execute("INSERT INTO stale SELECT ?, unnest(?::VARCHAR[])", [str(month.path), sorted(month.stale)])
        where = f" WHERE file NOT IN (SELECT file FROM stale WHERE path = {path})" if month.stale else ""
        parts.append(f"SELECT * FROM read_parquet({path}){where}")
    # By name: a month that was rolled up before a field was added has it unknown, and one that has more keeps it to itself.
    con.execute(f"CREATE VIEW everything AS SELECT {names} FROM ({' UNION ALL BY NAME '.join(parts)})")
    own = "SELECT * FROM everything WHERE NOT is_after"
    afterwards = (
        f"SELECT * FROM everything WHERE is_after AND (writer, seq) NOT IN (SELECT (writer, seq) FROM ({own})) "
        "QUALIFY row_number() OVER (PARTITION BY writer, seq ORDER BY file) = 1"
    )
    con.execute(f"CREATE VIEW records AS {f'{own} UNION ALL {afterwards}' if has_afterwards else 'FROM everything'}")
    return con


def quoted(text: str) -> str:
    """As SQL's literal."""
    return "'" + text.replace("'", "''") + "'"


def _types(columns: Collection[str]) -> dict[str, str]:
    return {
        **{name: kind for name, (kind, _) in COLUMNS.items() if name in columns},
        "file": "VARCHAR",
        "is_after": "BOOLEAN",
    }


def _arrays(found: Sequence[tuple[Record, str, bool]], columns: Collection[str]) -> dict[str, Any]:
    import numpy as np  # here, as rolled-up months need none

    dtypes = {"VARCHAR": object, "BIGINT": np.int64, "DOUBLE": np.float64}
    records, files, are_after = zip(*found, strict=True)
    arrays = {
        name: np.fromiter(get(records), dtypes[kind], len(records))
        for name, (kind, get) in COLUMNS.items()
        if name in columns
    }
    return {**arrays, "file": np.array(files, dtype=object), "is_after": np.array(are_after, dtype=bool)}
