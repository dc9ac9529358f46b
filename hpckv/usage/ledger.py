"""Ledger files: one writer appends records, a strict reader takes what verifies (`docs/ledger-format.md`, 1 to 3)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import msgspec
from blake3 import blake3

from hpckv.usage.record import IN_ORDER, VERSION, Counters, Record

_CRC = b',"crc":"'
_CRC_AT = len(_CRC) + 16 + len('"}')

MakeFolder = Callable[[Path], None]
"""Makes a folder with all above it, with the modes that belong there; raises `OSError`."""


def month_of(t: float) -> str:
    """YYYY-MM, UTC."""
    return _month_of_day(int(t // 86400))


@lru_cache(maxsize=4096)
def _month_of_day(day: int) -> str:
    return time.strftime("%Y-%m", time.gmtime(day * 86400))


class LedgerFile:
    """The file of one writer: this process."""

    def __init__(self, folder: Path, pattern: Record, make_folder: MakeFolder, *, now: float | None = None) -> None:
        """`folder` gets a folder for each month. Nothing is written yet."""
        self._folder, self._make_folder, self.pattern = folder, make_folder, pattern
        self._seq, self._prev, self._month = 0, "", ""
        self._t = time.time() if now is None else now
        self._fd: int | None = None

    @property
    def path(self) -> Path:
        """Where the latest record is."""
        return self._folder / self._month / f"{self.pattern.writer}.jsonl"

    def append(self, counters: Counters, now: float | None = None) -> None:
        """One record from the last one's end until `now`, on the disk on return. Raises `OSError`; that was the last then."""
        t1 = max(self._t, time.time() if now is None else now)
        if month_of(t1) != self._month:
            self._open(month_of(t1))
        assert self._fd is not None
        line = encode(self.pattern.with_counters(counters, seq=self._seq, t0=self._t, t1=t1, prev=self._prev))
        written = os.write(self._fd, line)
        if written != len(line):  # a full filesystem; more of it would only make a second torn line
            raise OSError(28, "written in part only", str(self.path))
        os.fsync(self._fd)
        self._seq, self._t, self._prev = self._seq + 1, t1, digest(line[:-1])

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self, month: str) -> None:
        self.close()
        self._month, self._prev = month, ""
        self._make_folder(self.path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o640)
        os.fchmod(self._fd, 0o640)  # whatever the umask is


def encode(record: Record) -> bytes:
    """The whole line, with its `crc` and a newline."""
    body = msgspec.json.encode({name: getattr(record, name) for name in IN_ORDER})[:-1]
    return body + _CRC + digest(body).encode() + b'"}\n'


def digest(line: bytes) -> str:
    return blake3(line).hexdigest(8)


class Oddity(msgspec.Struct, frozen=True):
    """Something in a ledger that does not count, and why."""

    path: Path
    what: str
    num_bytes: int = 0
    """Left out, as far as known."""


class Verified(msgspec.Struct):
    """What a file holds, as far as it verifies."""

    lines: list[bytes]
    length: int
    """Bytes of them."""
    last: str
    """Digest of the last one."""
    left: int
    """Bytes that follow and do not verify."""


def verified_lines(content: bytes) -> Verified:
    """The longest beginning whose lines chain and match their digests."""
    lines: list[bytes] = []
    length, prev = 0, ""
    for line in content.split(b"\n")[:-1]:
        hashed = blake3(line[:-_CRC_AT])
        if not line.endswith(f',"prev":"{prev}","crc":"{hashed.hexdigest(8)}"}}'.encode()):
            break
        lines.append(line)
        length += len(line) + 1
        prev = hashed.update(line[-_CRC_AT:]).hexdigest(8)  # of the whole line
    return Verified(lines, length, prev, len(content) - length)


class _Version(msgspec.Struct):
    v: int


_version = msgspec.json.Decoder(_Version).decode
_record = msgspec.json.Decoder(Record).decode


def records_in(path: Path, found: Verified, uid: int, on_oddity: Callable[[Oddity], None]) -> Iterator[Record]:
    """Records of a file that `uid` owns which count, by section 3 of the format; what does not is reported."""
    if found.left:
        on_oddity(Oddity(path, f"{found.left} bytes after record {len(found.lines) - 1} do not verify", found.left))
    for number, line in enumerate(found.lines):
        try:
            record = _record(line)
            wrong = record.what_is_wrong or (
                f"says it is of uid {record.uid}, the file is of {uid}" if record.uid != uid else ""
            )
        except msgspec.DecodeError as error:
            wrong = _of_newer_version(line) or f"not a record: {error}"
        if wrong:
            on_oddity(Oddity(path, f"line {number + 1}: {wrong}", len(line) + 1))
        else:
            yield record


def _of_newer_version(line: bytes) -> str:
    try:
        v = _version(line).v
    except msgspec.DecodeError:
        return ""
    return "" if v == VERSION else f"version {v}, this program knows {VERSION}"
