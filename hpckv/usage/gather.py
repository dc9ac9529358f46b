"""All records that a question is about: from ledger files, and from closed months that were rolled up."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from hpckv.store.foreign_file import UnusableFileError, open_trusted
from hpckv.store.layout import StoreLayout
from hpckv.store.survey import users
from hpckv.usage.ledger import Oddity, Verified, digest, month_of, records_in, verified_lines
from hpckv.usage.months import RolledUp, new_database, read_rolled_up
from hpckv.usage.record import Record

if TYPE_CHECKING:
    import duckdb

_LARGEST_FILE = 256 * 1024**2
"""A record a minute fills it in 600 years; what is longer is no ledger."""
_MOST_ODDITIES = 10
"""Of one file, before the rest is only counted: who writes nonsense fills nobody's screen."""
AS_ROLLED_UP = "counted as it was rolled up"
CHANGED = f"{AS_ROLLED_UP}: shorter, or another file, by now"


@dataclass(frozen=True)
class LedgerPath:
    """One ledger file, not yet read."""

    path: Path
    uid: int
    """Who must own it."""

    @classmethod
    def of_key(cls, layout: StoreLayout, month: str, key: str) -> LedgerPath:
        """The file of a store that has this `key` in a roll-up of the month."""
        uid, _, name = key.partition("/")
        return cls(layout.ledger(int(uid)) / month / name, int(uid))

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
            if first <= path.stem <= last and (rolled := _rolled_up(path, store.stat().st_uid, found, database)):
                here = files.get(path.stem, [])
                files[path.stem] = [file for file in here if file.key not in rolled.files]
                found.months.append(_beside(rolled, layout, here, found))
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


def read_file(file: LedgerPath, found: Gathered, rolled: tuple[int, str] = (0, "")) -> tuple[int, str] | None:
    """Add what counts of a file, and what is odd about it: its valid length and last line's digest, None if nothing of it counts.

    That is so, too, if it does not begin with what was `rolled` up of it, which then goes on counting.
    """
    found.num_files += 1
    otherwise = AS_ROLLED_UP if rolled[0] else "left out"
    try:
        fd, status = open_trusted(file.path, frozenset({file.uid}))
        with os.fdopen(fd, "rb") as stream:
            if status.st_size > _LARGEST_FILE:
                raise UnusableFileError(f"{status.st_size} bytes are no ledger")
            content = stream.read()
    except (OSError, UnusableFileError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        found.oddities.append(Oddity(file.path, f"{otherwise}: {reason}"))
        return None
    verified = verified_lines(content)
    if not _goes_on(content, verified, *rolled):
        found.oddities.append(Oddity(file.path, CHANGED))
        return None
    writer, month, key, is_afterwards = file.writer, file.month, file.key, file.is_afterwards
    latest = -1
    odd: list[Oddity] = []
    for record in records_in(file.path, verified, file.uid, odd.append):
        if record.writer != writer or month_of(record.t1) != month:
            odd.append(Oddity(file.path, f"record {record.seq} is of another writer or month"))
        elif record.seq <= latest:
            odd.append(Oddity(file.path, f"record {record.seq} after record {latest}: left out"))
        else:
            found.records.append((record, key, is_afterwards))
            latest = record.seq
    found.oddities += odd[:_MOST_ODDITIES]
    if more := odd[_MOST_ODDITIES:]:
        num_bytes = sum(oddity.num_bytes for oddity in more)
        found.oddities.append(Oddity(file.path, f"and {len(more)} more that do not count", num_bytes))
    return (verified.length, verified.last) if verified.length else None


def _goes_on(content: bytes, verified: Verified, length: int, last: str) -> bool:
    """Whether a file is what was rolled up of it, up to `length`, and perhaps more."""
    if length > verified.length:
        return False
    line = content[:length].removesuffix(b"\n").rpartition(b"\n")[2]
    return length == 0 or (content[length - 1 : length] == b"\n" and digest(line) == last)


def _rolled_up(
    path: Path, uid: int, found: Gathered, database: Callable[[], duckdb.DuckDBPyConnection]
) -> RolledUp | None:
    try:
        return read_rolled_up(path, uid, database)
    except UnusableFileError as error:
        found.oddities.append(Oddity(path, f"not used, its month's files are read instead: {error}"))
        return None


def _beside(rolled: RolledUp, layout: StoreLayout, here: Iterable[LedgerPath], found: Gathered) -> RolledUp:
    """The month beside the files that are there, of which those are read that have grown."""
    stale = set()
    for file in here:
        length, last = rolled.files.get(file.key, (0, ""))
        size = _size(file.path)
        if length and size < length:
            found.oddities.append(Oddity(file.path, CHANGED))
        elif length and size > length and read_file(file, found, (length, last)):
            stale.add(file.key)
    repeat_oddities(rolled, rolled.files.keys() - stale, layout, found)
    return replace(rolled, stale=frozenset(stale))


def repeat_oddities(rolled: RolledUp, keys: Collection[str], layout: StoreLayout, found: Gathered) -> None:
    """Add what was odd about these files when the month was rolled up, unless it has been found again."""
    known = {(oddity.path, oddity.what) for oddity in found.oddities}
    for key, what, num_bytes in rolled.odd:
        if key in keys:
            path = LedgerPath.of_key(layout, rolled.month, key).path
            found.oddities += [Oddity(path, what, num_bytes)] if (path, what) not in known else []


def _size(path: Path) -> int:
    try:
        status = path.lstat()
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    except OSError:
        return 0
