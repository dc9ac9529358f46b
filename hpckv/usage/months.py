"""What the file of a rolled-up month says of itself, beside its records (`docs/ledger-format.md`, 5)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpckv.store.foreign_file import UnusableFileError, open_trusted
from hpckv.usage.record import VERSION

if TYPE_CHECKING:
    import duckdb

_MOST_THREADS = 8
"""A login node has many cores, and they are everybody's."""


class OtherVersionError(UnusableFileError):
    """A month was rolled up by a program that knows other records: what it left out this one may count, or the reverse."""


@dataclass(frozen=True)
class RolledUp:
    """A closed month of a store."""

    path: Path
    files: dict[str, tuple[int, str]]
    """Of each ledger file that is in it, by `LedgerPath.key`: valid length, and the last line's digest."""
    odd: tuple[tuple[str, str, int], ...] = ()
    """What of these files does not count: key, why, and bytes that are left out."""
    stale: frozenset[str] = frozenset()
    """Keys of files whose rows do not count: they have grown and are read themselves, or are another source's too."""

    @property
    def month(self) -> str:
        return self.path.stem


def new_database() -> duckdb.DuckDBPyConnection:
    """An empty one in memory, that loads no code from elsewhere."""
    import duckdb

    num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    closed = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    return duckdb.connect(config={**closed, "threads": num_threads})


def description(files: dict[str, tuple[int, str]], odd: Iterable[tuple[str, str, int]]) -> str:
    """What `read_rolled_up` reads."""
    return json.dumps({"v": VERSION, "files": files, "odd": list(odd)})


def read_rolled_up(path: Path, uid: int, database: Callable[[], duckdb.DuckDBPyConnection] = new_database) -> RolledUp:
    """Raises `OtherVersionError`, or another `UnusableFileError` if the file is not `uid`'s or damaged."""
    import duckdb

    try:
        fd, _ = open_trusted(path, frozenset({uid}))
        os.close(fd)
        query = "SELECT value FROM parquet_kv_metadata(?) WHERE key = 'hpckv'"
        rows = database().execute(query, [str(path)]).fetchall()
        said = json.loads(rows[0][0] if rows else b"")
        if said["v"] != VERSION:
            raise OtherVersionError(f"version {said['v']}, this program knows {VERSION}")
        files = {str(key): (int(length), str(last)) for key, (length, last) in said["files"].items()}
        odd = tuple((str(key), str(what), int(num_bytes)) for key, what, num_bytes in said.get("odd", ()))
        return RolledUp(path, files, odd)
    except (OSError, duckdb.Error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableFileError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
