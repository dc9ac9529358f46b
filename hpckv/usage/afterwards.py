"""What a writer that was killed had not recorded, found out from the output by the next start (`docs/ledger-format.md`, 4)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from functools import reduce
from operator import add
from pathlib import Path

import msgspec

from hpckv.store.durable import publish
from hpckv.usage.gather import Gathered, LedgerPath, read_file
from hpckv.usage.ledger import encode, month_of
from hpckv.usage.record import Counters, Record

_log = logging.getLogger(__name__)


class Served(msgspec.Struct):
    """What an output says of answers that it holds."""

    requests: int = 0
    prompt_tokens: int = 0
    cached: dict[str, int] = {}
    computed_tokens: int = 0
    output_tokens: int = 0
    until: float = 0.0
    """When the last answer was written, seconds since 1970."""


def record_afterwards(ledgers: Iterable[Path], served: Served) -> Path | None:
    """Write what `served` has more than all `ledgers` of this user say; where, or None if there is nothing to add.

    `ledgers` are a run's files, one path for each writer; all of its writers are dead. The record goes to the one that wrote
    last and ends with the last answer. Where a part of a ledger is gone nothing is written: it would count twice what that part
    had. Raises `OSError`.
    """
    found, ledgers = Gathered(), list(ledgers)
    for ledger in ledgers:
        paths = sorted(ledger.parent.parent.glob(f"*/{ledger.stem}*.jsonl"))
        for path in paths:
            read_file(LedgerPath(path, os.getuid()), found)
        if not paths:
            _log.warning("%s: not there any more; what this run had not recorded is not accounted for", ledger)
            return None
    records = list({(r.writer, r.seq): r for r, _, _ in sorted(found.records, key=lambda one: not one[2])}.values())
    if not records:
        return None
    if gone := _writer_with_a_gap(records):
        _log.warning("%s: a part of its ledger is gone; what this run had not recorded is not accounted for", gone)
        return None
    known = reduce(add, (as_counters(record) for record in records))
    missing = Counters(
        requests=served.requests - known.requests,
        prompt_tokens=served.prompt_tokens - known.prompt_tokens,
        cached={tier: count - known.cached.get(tier, 0) for tier, count in served.cached.items()},
        computed_tokens=served.computed_tokens - known.computed_tokens,
        output_tokens=served.output_tokens - known.output_tokens,
    )
    last = max(records, key=lambda record: (record.t1, record.seq))
    t1 = max(last.t1, served.until)
    if missing.requests <= 0 or last.seq + 1 in {r.seq for r in records if r.writer == last.writer}:
        return None
    missing.cached = {tier: count for tier, count in missing.cached.items() if count}
    missing.gpu_s = last.num_gpus * (t1 - last.t1)
    record = last.with_counters(missing, seq=last.seq + 1, t0=last.t1, t1=t1, prev="")
    if record.what_is_wrong:  # answers that were counted and whose lines were lost hide others
        _log.warning("%s: not all that was answered before is accounted for", last.writer)
        return None
    (folder,) = {ledger.parent.parent for ledger in ledgers if ledger.stem == last.writer}
    path = folder / month_of(t1) / f"{last.writer}.after-{record.seq}.jsonl"
    if not path.parent.is_dir():
        path.parent.mkdir()
        path.parent.chmod(folder.stat().st_mode & 0o7777)
    publish(path, [encode(record)], mode=0o440, replace=False)
    _log.info("ledger: %d answers that had not been recorded", missing.requests)
    return path


def _writer_with_a_gap(records: Iterable[Record]) -> str:
    """The first of whose records some before the last are missing; empty if there is none."""
    numbers: dict[str, set[int]] = {}
    for record in records:
        numbers.setdefault(record.writer, set()).add(record.seq)
    return next((writer for writer, seqs in numbers.items() if len(seqs) <= max(seqs)), "")


def as_counters(record: Record) -> Counters:
    """A record's counters alone."""
    return Counters(**{name: getattr(record, name) for name in Counters.__struct_fields__})
