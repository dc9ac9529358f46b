"""Every sum is exact also of a past in which writers were killed anywhere within a write, and records are there several times."""

import random

import msgspec
import pytest

from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage import ledger
from hpckv.usage.ledger import LedgerFile, encode, month_of
from hpckv.usage.record import Counters, Record
from hpckv.usage.rollup import closed_months, roll_up
from tests.usage.test_sums import END, JULY, Truth, check, give_away, random_counters

pytestmark = pytest.mark.root


def make_hard_past(store: StoreRoot, *, num_writers: int, num_records: int, uids: range) -> tuple[Truth, int]:
    """Jobs of three starts each: what was done, and how many files have something that must not count."""
    rng, truth, num_oddities = random.Random(1), Truth(), 0
    for number in range(num_writers):
        job, uid = number // 3, uids[number // 3 % len(uids)]
        environ = {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(number % 3), "SLURM_JOB_ACCOUNT": f"a{uid % 5}"}
        pattern = Record.of_this_process(environ=environ, model=f"m{job % 7}", gpu="NVIDIA H100", project="vision")
        pattern.uid = uid
        t = JULY + rng.random() * (END - JULY - 60 * (num_records + 9))
        file = LedgerFile(
            store.layout.ledger(uid), pattern, lambda path: path.mkdir(parents=True, exist_ok=True), now=t
        )
        for seq in range(num_records):
            counters = random_counters(rng, uids)
            file.append(counters, now=t + 60)
            truth.add(pattern.with_counters(counters, seq=seq, t0=t, t1=t + 60, prev=""), str(job))
            t += 60.0
        lost = pattern.with_counters(random_counters(rng, uids), seq=num_records, t0=t, t1=t + 61, prev="")
        what_happened = ("ended", "killed", "killed, found out", "declared dead", "replayed")[number % 5]
        if what_happened in ("killed", "killed, found out"):
            line = encode(lost)
            with file.path.open("ab") as stream:
                stream.write(line[: 1 + number % (len(line) - 1)])
            num_oddities += 1
        if what_happened in ("killed, found out", "declared dead"):
            for name in range(3):  # by three starts, who each think that they are the first
                path = (
                    store.layout.ledger(uid) / month_of(lost.t1) / f"{pattern.writer}.after-{num_records + name}.jsonl"
                )
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(encode(lost))
        if what_happened == "killed, found out":
            truth.add(lost, str(job))
        if what_happened == "declared dead":
            own = random_counters(rng, uids)
            file.append(own, now=t + 62)
            truth.add(pattern.with_counters(own, seq=num_records, t0=t, t1=t + 62, prev=""), str(job))
        if what_happened == "replayed":
            lines = file.path.read_bytes().splitlines(keepends=True)
            file.path.write_bytes(b"".join([*lines, *lines[-5:] * 3]))
            num_oddities += 1
        file.close()
    give_away(store, uids)
    return truth, num_oddities


def roll_up_and_check(store: StoreRoot, truth: Truth, num_oddities: int) -> None:
    months = closed_months(store, END)
    for month in months[::2]:
        roll_up(store, month)
    check(store, truth, num_oddities=num_oddities)
    for month in months:
        roll_up(store, month)
    check(store, truth, num_oddities=num_oddities)


def test_sums_are_the_truth_also_after_kills_and_replays(tmp_path):
    store = StoreRoot.create(tmp_path / "store", StorePolicy.new())
    truth, num_oddities = make_hard_past(store, num_writers=150, num_records=6, uids=range(2001, 2006))
    assert num_oddities == 90
    check(store, truth, num_oddities=num_oddities)
    roll_up_and_check(store, truth, num_oddities)


@pytest.mark.slow
def test_sums_of_a_million_records_are_the_truth(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger.os, "fsync", lambda fd: None)  # nobody cuts the power here
    store = StoreRoot.create(tmp_path / "store", StorePolicy.new())
    truth, num_oddities = make_hard_past(store, num_writers=5000, num_records=200, uids=range(2001, 2041))
    monkeypatch.undo()
    check(store, truth, num_oddities=num_oddities)
    roll_up_and_check(store, truth, num_oddities)


def test_a_record_whose_number_was_there_before_does_not_count(tmp_path):
    store = StoreRoot.create(tmp_path / "store", StorePolicy.new())
    truth, _ = make_hard_past(store, num_writers=1, num_records=3, uids=range(2001, 2002))
    (path,) = store.layout.ledger(2001).glob("*/*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    last = msgspec.json.decode(lines[-1], type=Record)
    again = last.with_counters(Counters(), seq=1, t0=last.t1, t1=last.t1, prev=ledger.digest(lines[-1][:-1]))
    path.write_bytes(b"".join([*lines, encode(again)]))
    check(store, truth, num_oddities=1)
