"""Records as a DuckDB table, from memory and from rolled-up months: what every question is asked of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import duckdb
import msgspec
import numpy as np

from hpckv.usage.gather import Gathered
from hpckv.usage.record import TIERS, Record

_json = msgspec.json.Encoder().encode
Get = Callable[[Record], Any]


def _part(name: str, tier: str) -> Get:
    return lambda record: getattr(record, name).get(tier, 0)


def _field(name: str) -> Get:
    return lambda record: getattr(record, name)


_KINDS = {str: "VARCHAR", str | None: "VARCHAR", int: "BIGINT", int | None: "BIGINT", float: "DOUBLE"}
_UNKNOWN = "energy_j"
"""A number that may be unknown: NaN in an array, NULL in the table."""
_PARTS = {"cached": TIERS, "read_bytes": TIERS[1:], "written_bytes": TIERS[1:]}
COLUMNS: dict[str, tuple[str, Get]] = {
    **{f.name: (_KINDS[f.type], _field(f.name)) for f in msgspec.structs.fields(Record) if f.type in _KINDS},
    **{f"{name}_{tier}": ("BIGINT", _part(name, tier)) for name, tiers in _PARTS.items() for tier in tiers},
    "array_task": ("BIGINT", lambda record: -1 if record.array_task is None else record.array_task),
    _UNKNOWN: ("DOUBLE", lambda record: math.nan if record.energy_j is None else record.energy_j),
    "by_writer": ("VARCHAR", lambda record: _json(record.by_writer).decode()),
}
"""Type, and a record's value."""
_DTYPES = {"VARCHAR": object, "BIGINT": np.int64, "DOUBLE": np.float64}


def connect(found: Gathered) -> duckdb.DuckDBPyConnection:
    """A database with the view `records`, each `(writer, seq)` once: the writer's own before one written afterwards.

    Beside a record's fields it has `file`, the ledger file's name, and `is_after`. Rolled-up months are read when they are asked
    about, and of them only the columns that are.
    """
    con = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})
    types = ", ".join(f"{name} {kind}" for name, (kind, _) in COLUMNS.items())
    con.execute(f"CREATE TABLE fresh ({types}, file VARCHAR, is_after BOOLEAN)")
    names = ", ".join([*COLUMNS, "file", "is_after"])
    if found.records:
        batch = _arrays([record for record, _, _ in found.records])
        batch["file"] = np.array([file for _, file, _ in found.records], dtype=object)
        batch["is_after"] = np.array([is_after for _, _, is_after in found.records], dtype=bool)
        con.register("batch", batch)
        given = names.replace(_UNKNOWN, f"nullif({_UNKNOWN}, 'nan'::DOUBLE)")
        con.execute(f"INSERT INTO fresh SELECT {given} FROM batch")
        con.unregister("batch")
    con.execute("CREATE TABLE stale (path VARCHAR, file VARCHAR)")
    parts = [f"SELECT {names} FROM fresh"]
    for month in found.months:
        path = _quoted(str(month.path))
        for file in sorted(month.stale):
            con.execute("INSERT INTO stale VALUES (?, ?)", [str(month.path), file])
        where = f" WHERE file NOT IN (SELECT file FROM stale WHERE path = {path})" if month.stale else ""
        parts.append(f"SELECT * FROM read_parquet({path}){where}")
    # By name: a month that was rolled up before a field was added has it unknown, and one that has more keeps it to itself.
    con.execute(f"CREATE VIEW everything AS SELECT {names} FROM ({' UNION ALL BY NAME '.join(parts)})")
    ((num_after,),) = con.execute("SELECT count(*) FROM everything WHERE is_after").fetchall()
    own = "(SELECT (writer, seq) FROM everything WHERE NOT is_after)"
    where = f" WHERE NOT is_after OR (writer, seq) NOT IN {own}" if num_after else ""
    con.execute(f"CREATE VIEW records AS SELECT * FROM everything{where}")
    return con


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _arrays(records: Sequence[Record]) -> dict[str, Any]:
    return {
        name: np.array([get(record) for record in records], dtype=_DTYPES[kind])
        for name, (kind, get) in COLUMNS.items()
    }
