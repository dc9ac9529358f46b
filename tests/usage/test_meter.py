"""The thread that keeps a ledger: deltas that add up to everything, and trouble that stops the ledger and never the work."""

import errno
import itertools
import os
import threading
import time

import pytest

from hpckv.usage.ledger import LedgerFile, records_in, verified_lines
from hpckv.usage.meter import Meter
from hpckv.usage.record import Counters, Record


class Work:
    """Counters that grow as somebody works."""

    def __init__(self) -> None:
        self.counters = Counters()

    def do(self, count: int) -> None:
        self.counters += Counters(requests=count, prompt_tokens=3 * count, computed_tokens=3 * count)

    def sample(self) -> Counters:
        return self.counters


def ledger_file(folder) -> LedgerFile:
    return LedgerFile(folder, Record.of_this_process(environ={}), lambda path: path.mkdir(parents=True))


def records(file: LedgerFile) -> list[Record]:
    odd: list = []
    return list(records_in(file.path, verified_lines(file.path.read_bytes()), os.getuid(), odd.append))


def test_a_record_at_the_start_one_each_interval_and_one_at_the_end(tmp_path):
    work, file = Work(), ledger_file(tmp_path)
    meter = Meter(file, work.sample, patience_s=30, interval_s=0.05)
    assert len(records(file)) >= 1
    for _ in range(4):
        work.do(2)
        seen = len(records(file))
        end = time.monotonic() + 30
        while len(records(file)) < seen + 2 and time.monotonic() < end:
            time.sleep(0.01)
    work.do(1)
    meter.close()
    meter.close()
    found = records(file)
    assert sum(record.requests for record in found) == 9
    assert [record.seq for record in found] == list(range(len(found)))
    assert all(a.t1 == b.t0 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("nth", range(4))
def test_a_write_that_fails_ends_the_ledger_and_is_said_once(tmp_path, monkeypatch, caplog, nth):
    work, file = Work(), ledger_file(tmp_path)
    real, count = os.write, 0

    def write(fd, data):
        nonlocal count
        count += 1
        if count == nth + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr("hpckv.usage.ledger.os.write", write)
    meter = Meter(file, work.sample, patience_s=30, interval_s=0.02)
    for _ in range(20):
        work.do(1)
        time.sleep(0.01)
    meter.close()
    said = [record.message for record in caplog.records if "No space left" in record.message]
    if count > nth:
        assert len(said) == 1
        assert count == nth + 1
        assert len(records(file)) == nth


def test_a_filesystem_that_hangs_holds_nobody_up(tmp_path, monkeypatch):
    work, file = Work(), ledger_file(tmp_path)
    meter = Meter(file, work.sample, patience_s=0.2, interval_s=100)
    back = threading.Event()
    monkeypatch.setattr("hpckv.usage.ledger.os.fsync", lambda fd: back.wait(60))
    work.do(1)
    start = time.monotonic()
    meter.close()
    assert time.monotonic() - start < 30
    back.set()


def test_counters_add_and_subtract_by_part():
    a = Counters(requests=3, cached={"device": 4, "host": 1}, by_writer={"7": 2})
    b = Counters(requests=1, cached={"device": 4, "shared": 2})
    assert (a - b).cached == {"host": 1, "shared": -2}
    assert (a + b).cached == {"device": 8, "host": 1, "shared": 2}
    assert (a + b - b) == a
