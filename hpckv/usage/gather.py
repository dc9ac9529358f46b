"""All records that a question is about: from ledger files, and from closed months that were rolled up."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from hpckv.store.foreign_file import UnusableFileError, open_trusted
from hpckv.store.layout import StoreLayout
from hpckv.store.survey import users
from hpckv.usage.ledger import Oddity, month_of, records_in, verified_lines
from hpckv.usage.record import Record

if TYPE_CHECKING:
    import duckdb

_LARGEST_FILE = 256 * 1024**2
"""A record a minute fills it in 600 years; what is longer is no ledger."""
_MOST_THREADS = 8
"""A login node has many cores, and they are everybody's."""


@dataclass(frozen=True)
class LedgerPath:
    """One ledger file, not yet read."""

    path: Path
    uid: int
    """Who must own it."""

    @property
    def month(self) -> str:
        return self.path.parent.name

    @property
    def writer(self) -> str:
        return self.path.stem.partition(".after-")[0]

    @property
    def is_afterwards(self) -> bool:
        """Written by another start, about one that was killed."""
        return ".after-" in self.path.stem

    @property
    def key(self) -> str:
        """Its name in a roll-up."""
        return f"{self.uid}/{self.path.name}"


@dataclass(frozen=True)
class RolledUp:
    """A closed month of a store."""

    path: Path
    files: dict[str, tuple[int, str]]
    """Of each ledger file that is in it, by `LedgerPath.key`: valid length, and the last line's digest."""
    stale: frozenset[str] = frozenset()
    """Keys of files that have grown since: their rows do not count, they are read themselves."""


@dataclass
class Gathered:
    """What was found."""

    records: list[tuple[Record, str, bool]] = field(default_factory=list)
    """Each with its file's `LedgerPath.key`, and whether it was written afterwards."""
    months: list[RolledUp] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)
    num_files: int = 0


def gather(stores: Iterable[Path], runs: Iterable[Path], start: float, end: float) -> Gathered:
    """Records of stores and of run directories whose month has a part in [start, end), seconds since 1970."""
    found, database = Gathered(), cache(new_database)
    first, last = month_of(max(0.0, start)), month_of(min(end, 253e9))
    for store in dict.fromkeys(path.resolve() for path in stores):
        layout = StoreLayout(store)
        files: dict[str, list[LedgerPath]] = {}
        for file in store_files(layout, first, last):
            files.setdefault(file.month, []).append(file)
        for path in sorted(layout.rolled_up.glob("*.parquet")):
            month = path.stem
            if first <= month <= last and (rolled := read_rolled_up(path, store.stat().st_uid, found, database)):
                here = files.get(month, [])
                view = _compare(rolled, here, found)
                found.months.append(view)
                files[month] = [file for file in here if file.key not in view.files or file.key in view.stale]
        for file in chain.from_iterable(files.values()):
            read_file(file, found)
    for run in dict.fromkeys(path.resolve() for path in runs):
        for path in sorted((run / "ledger").glob("*/*.jsonl")):
            if first <= path.parent.name <= last:
                with suppress(OSError):
                    read_file(LedgerPath(path, path.lstat().st_uid), found)
    return found


def store_files(layout: StoreLayout, first: str, last: str) -> Iterator[LedgerPath]:
    """Ledger files of months `first` to `last`, of everybody."""
    for uid, _ in sorted(users(layout)):
        with suppress(OSError):
            for month in sorted(os.listdir(layout.ledger(uid))):
                if first <= month <= last:
                    with suppress(OSError):
                        folder = layout.ledger(uid) / month
                        names = sorted(os.listdir(folder))
                        yield from (LedgerPath(folder / name, uid) for name in names if name.endswith(".jsonl"))


def read_file(file: LedgerPath, found: Gathered) -> bytes:
    """Add what counts of a file, and what is odd about it; what it holds."""
    found.num_files += 1
    try:
        fd, status = open_trusted(file.path, frozenset({file.uid}))
        with os.fdopen(fd, "rb") as stream:
            if status.st_size > _LARGEST_FILE:
                raise UnusableFileError(f"{status.st_size} bytes are no ledger")
            content = stream.read()
    except (OSError, UnusableFileError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        found.oddities.append(Oddity(file.path, f"left out: {reason}"))
        return b""
    writer, month, key, is_afterwards = file.writer, file.month, file.key, file.is_afterwards
    latest = -1
    for record in records_in(file.path, content, file.uid, found.oddities.append):
        if record.writer != writer or month_of(record.t1) != month:
            found.oddities.append(Oddity(file.path, f"record {record.seq} is of another writer or month"))
        elif record.seq <= latest:
            found.oddities.append(Oddity(file.path, f"record {record.seq} after record {latest}: left out"))
        else:
            found.records.append((record, key, is_afterwards))
            latest = record.seq
    return content


def new_database() -> duckdb.DuckDBPyConnection:
    """An empty one in memory, that loads no code from elsewhere."""
    import duckdb

    num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    closed = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    return duckdb.connect(config={**closed, "threads": num_threads})


def read_rolled_up(
    path: Path, uid: int, found: Gathered, database: Callable[[], duckdb.DuckDBPyConnection] = new_database
) -> RolledUp | None:
    """What a month's file says of itself; None if it is not `uid`'s, or damaged."""
    import duckdb

    try:
        fd, _ = open_trusted(path, frozenset({uid}))
        os.close(fd)
        query = "SELECT value FROM parquet_kv_metadata(?) WHERE key = 'hpckv'"
        rows = database().execute(query, [str(path)]).fetchall()
        files = json.loads(rows[0][0] if rows else b"")["files"]
        return RolledUp(path, {str(key): (int(length), str(last)) for key, (length, last) in files.items()})
    except (OSError, UnusableFileError, duckdb.Error, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        found.oddities.append(Oddity(path, f"not used, its month's files are read instead: {reason}"))
        return None


def _compare(rolled: RolledUp, here: Iterable[LedgerPath], found: Gathered) -> RolledUp:
    """The month beside the files that are there."""
    stale = set()
    for file in here:
        length, _ = rolled.files.get(file.key, (0, ""))
        size = _size(file.path)
        if length and size < length:
            found.oddities.append(Oddity(file.path, f"{length - size} bytes shorter than when it was rolled up"))
        elif length and size > length:
            stale.add(file.key)
    return replace(rolled, stale=frozenset(stale))


def valid_length(content: bytes) -> tuple[int, str]:
    """Of a ledger file: bytes that verify, and the last line's digest."""
    found = verified_lines(content)
    return found.length, found.last


def _size(path: Path) -> int:
    try:
        status = path.lstat()
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    except OSError:
        return 0
