"""All records that a question is about: from ledger files, and from closed months that were rolled up."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path

from hpckv.store.foreign_file import UnusableFileError, open_trusted
from hpckv.store.layout import StoreLayout
from hpckv.store.survey import users
from hpckv.usage.ledger import Oddity, Verified, digest, month_of, records_in, verified_lines
from hpckv.usage.months import RolledUp, new_database, read_rolled_up
from hpckv.usage.record import Record

_LARGEST_FILE = 256 * 1024**2
"""A record a minute fills it in 600 years; what is longer is no ledger."""
CLOCKS_DIFFER_S = 86400.0
"""Most that a node's clock, which records go by, is ahead of the file server's, which says when a file was written."""
_MOST_ODDITIES, _LONGEST = 10, 200
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


Ledger = tuple[str, str]
"""What one writer did in a month, wherever it lies: the month, and UID/WRITER."""


def _ledger(month: str, key: str) -> Ledger:
    return month, key.removesuffix(".jsonl").partition(".after-")[0]


@dataclass
class Gathered:
    """What was found."""

    records: list[tuple[Record, str, bool]] = field(default_factory=list)
    """Each with its file's `LedgerPath.key`, and whether it was written afterwards."""
    months: list[RolledUp] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)
    num_files: int = 0


def gather(
    stores: Iterable[Path], runs: Iterable[Path], start: float, end: float, uids: Collection[int] | None = None
) -> Gathered:
    """Records of stores and of run directories that may have ended in [start, end), seconds since 1970, and others.

    With `uids` no ledger file of anybody else is read; rolled-up months have everybody's all the same. A ledger that is in several
    sources, as one is a copy of another, counts once: as the first has it.
    """
    search = _Search(start, end, uids)
    for store in dict.fromkeys(path.resolve() for path in stores):
        search.add_store(store)
    for run in dict.fromkeys(path.resolve() for path in runs):
        search.add_run(run)
    return search.found


class _Search:
    """Goes through one source after the other."""

    def __init__(self, start: float, end: float, uids: Collection[int] | None) -> None:
        self.found = Gathered()
        self._start, self._uids = start, uids
        self._months = month_of(max(0.0, start)), month_of(min(end, 253e9))
        self._database = cache(new_database)
        self._source: dict[Ledger, Path] = {}
        """Where a ledger was found first."""
        self._again: dict[Path, set[Ledger]] = {}
        """Of the source at hand: what an earlier one has."""

    def add_store(self, store: Path) -> None:
        layout, (first, last) = StoreLayout(store), self._months
        files: dict[str, list[LedgerPath]] = {}
        for file in store_files(layout, first, last, self.found, self._uids):
            files.setdefault(file.month, []).append(file)
        owner = store.stat().st_uid
        for path in _listed(layout.rolled_up, self.found):
            if path.suffix == ".parquet" and first <= path.stem <= last and (rolled := self._rolled_up(path, owner)):
                here = files.get(path.stem, [])
                files[path.stem] = [file for file in here if file.key not in rolled.files]
                self.found.months.append(self._beside(rolled, layout, here))
        unread = chain.from_iterable(files.values())
        self._add_files(((file, _status(file.path, self.found)) for file in unread), store)

    def add_run(self, run: Path) -> None:
        paths = _month_files(run / "ledger", *self._months, self.found)
        statuses = ((path, _status(path, self.found)) for path in paths)
        owned = ((LedgerPath(path, status.st_uid), status) for path, status in statuses if status)
        self._add_files(((file, status) for file, status in owned if self._is_asked_about(file.uid)), run)

    def _add_files(self, files: Iterable[tuple[LedgerPath, os.stat_result | None]], source: Path) -> None:
        """The last of a source."""
        for file, status in files:
            ledger = _ledger(file.month, file.key)
            if status is None or self._is_before(status) or self._is_elsewhere(ledger, source):
                continue
            if read_file(file, self.found):
                self._source[ledger] = source
        for other, ledgers in self._again.items():
            self.found.oddities.append(Oddity(source, f"the same ledgers as in {other}, counted once: {len(ledgers)}"))
        self._again.clear()

    def _is_asked_about(self, uid: int) -> bool:
        return self._uids is None or uid in self._uids

    def _is_before(self, status: os.stat_result) -> bool:
        """Whether a file holds nothing of the window: a writer appends in the order of `t1`, and the last time was before it."""
        return status.st_mtime < self._start - CLOCKS_DIFFER_S

    def _is_elsewhere(self, ledger: Ledger, source: Path) -> bool:
        """Whether an earlier source has it, which is said at the end of this one."""
        first = self._source.get(ledger, source)
        if first != source:
            self._again.setdefault(first, set()).add(ledger)
        return first != source

    def _rolled_up(self, path: Path, owner: int) -> RolledUp | None:
        try:
            return read_rolled_up(path, owner, self._database)
        except UnusableFileError as error:
            what = f"not used, its month's files are read instead: {error}"
            self.found.oddities.append(Oddity(path, what))
            return None

    def _beside(self, rolled: RolledUp, layout: StoreLayout, here: Iterable[LedgerPath]) -> RolledUp:
        """The month beside the files that are there, of which those are read that have grown."""
        ledgers = {key: _ledger(rolled.month, key) for key in rolled.files}
        stale = {key for key, ledger in ledgers.items() if self._is_elsewhere(ledger, layout.root)}
        self._source.update((ledger, layout.root) for key, ledger in ledgers.items() if key not in stale)
        for file in here:
            length, last = rolled.files.get(file.key, (0, ""))
            if not length or file.key in stale or not (status := _status(file.path, self.found)):
                continue
            if self._is_before(status):
                continue
            size = status.st_size if stat.S_ISREG(status.st_mode) else 0
            if size < length:
                self.found.oddities.append(Oddity(file.path, CHANGED))
            elif size > length and read_file(file, self.found, (length, last)):
                stale.add(file.key)
        counted = rolled.files.keys() - stale
        asked_about = {key for key in counted if self._is_asked_about(int(key.partition("/")[0]))}
        repeat_oddities(rolled, asked_about, layout, self.found)
        return replace(rolled, stale=frozenset(stale))


def repeat_oddities(rolled: RolledUp, keys: Collection[str], layout: StoreLayout, found: Gathered) -> None:
    """Add what was odd about these files when the month was rolled up, unless it has been found again."""
    known = {(oddity.path, oddity.what) for oddity in found.oddities}
    for key, what, num_bytes in rolled.odd:
        if key in keys:
            path = LedgerPath.of_key(layout, rolled.month, key).path
            found.oddities += [Oddity(path, what, num_bytes)] if (path, what) not in known else []


def store_files(
    layout: StoreLayout, first: str, last: str, found: Gathered, uids: Collection[int] | None = None
) -> Iterator[LedgerPath]:
    """Ledger files of months `first` to `last`, of these users or everybody; `found` gets to know what cannot be listed."""
    for uid, _ in sorted(users(layout)):
        if uids is None or uid in uids:
            yield from (LedgerPath(path, uid) for path in _month_files(layout.ledger(uid), first, last, found))


def _month_files(folder: Path, first: str, last: str, found: Gathered) -> Iterator[Path]:
    months = [month for month in _listed(folder, found) if first <= month.name <= last]
    for month in months:
        yield from (path for path in _listed(month, found) if path.suffix == ".jsonl")


def _listed(folder: Path, found: Gathered) -> list[Path]:
    """What lies in a folder, in order; one that is not there is empty, and one that cannot be listed is odd."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        found.oddities.append(Oddity(folder, f"left out: {error.strerror}"))
        return []
    if not all(map(str.isprintable, names)):  # no writer has such a name, and neither a database nor a screen should
        found.oddities.append(Oddity(folder, "left out: names with characters that do not print"))
    return [folder / name for name in names if name.isprintable()]


def _status(path: Path, found: Gathered) -> os.stat_result | None:
    """None if the file is gone, or if nobody says what it is, which is odd."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        found.oddities.append(Oddity(path, f"left out: {error.strerror}"))
        return None


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
    found.oddities += map(_legible, odd[:_MOST_ODDITIES])
    if more := odd[_MOST_ODDITIES:]:
        num_bytes = sum(oddity.num_bytes for oddity in more)
        found.oddities.append(Oddity(file.path, f"and {len(more)} more that do not count", num_bytes))
    return (verified.length, verified.last) if verified.length else None


def _legible(oddity: Oddity) -> Oddity:
    """What a record says may be long, and move the cursor of whoever reads it."""
    what = "".join(sign if sign.isprintable() else "?" for sign in oddity.what[: _LONGEST + 1])
    return Oddity(oddity.path, f"{what[:_LONGEST]}..." if len(what) > _LONGEST else what, oddity.num_bytes)


def _goes_on(content: bytes, verified: Verified, length: int, last: str) -> bool:
    """Whether a file is what was rolled up of it, up to `length`, and perhaps more."""
    if length > verified.length:
        return False
    line = content[:length].removesuffix(b"\n").rpartition(b"\n")[2]
    return length == 0 or (content[length - 1 : length] == b"\n" and digest(line) == last)
