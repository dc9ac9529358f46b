"""Of a ledger only those files are read that a question may be about."""

import os
from pathlib import Path

import pytest

from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.gather import gather
from hpckv.usage.ledger import LedgerFile
from hpckv.usage.record import Counters, Record
from hpckv.usage.rollup import roll_up

OCTOBER_1 = 1790812800.0
"""2026-10-01T00:00:00Z"""
DAY = 86400.0
ALICE, BOB = 2001, 2002


def work(ledger: Path, uid: int, day: int) -> Path:
    """A job of a minute on this day of October; its file, as if it had been written then."""
    pattern = Record.of_this_process(environ={"SLURM_JOB_ID": str(day)})
    pattern.uid, begun = uid, OCTOBER_1 + (day - 1) * DAY
    file = LedgerFile(ledger, pattern, lambda path: path.mkdir(parents=True, exist_ok=True), now=begun)
    file.append(Counters(requests=1, prompt_tokens=8, computed_tokens=8), now=begun + 60)
    file.close()
    os.utime(file.path, (begun + 60, begun + 60))
    return file.path


@pytest.fixture
def store(tmp_path) -> StoreRoot:
    return StoreRoot.create(tmp_path / "store", StorePolicy.new())


def of_both(store: StoreRoot) -> None:
    for uid in (ALICE, BOB):
        for day in (3, 9):
            work(store.layout.ledger(uid), uid, day)
        torn = work(store.layout.ledger(uid), uid, 20)
        torn.write_bytes(torn.read_bytes() + b"torn")
        for path in [store.layout.user(uid), *store.layout.user(uid).rglob("*")]:
            os.chown(path, uid, -1)


@pytest.mark.root
def test_nobody_else_s_files_are_read_if_one_user_is_asked_about(store):
    of_both(store)
    found = gather([store.layout.root], [], OCTOBER_1, OCTOBER_1 + 30 * DAY, [BOB])
    assert {record.uid for record, _, _ in found.records} == {BOB}
    assert (found.num_files, len(found.oddities)) == (3, 1)
    assert gather([store.layout.root], [], OCTOBER_1, OCTOBER_1 + 30 * DAY, []).num_files == 0
    everything = gather([store.layout.root], [], OCTOBER_1, OCTOBER_1 + 30 * DAY)
    assert (everything.num_files, len(everything.oddities)) == (6, 2)


@pytest.mark.root
def test_nor_is_said_what_was_odd_in_them_when_their_month_was_rolled_up(store):
    of_both(store)
    roll_up(store, "2026-10")
    for path in store.layout.users.glob("*/ledger/*/20.*"):
        path.unlink()
    asked = gather([store.layout.root], [], OCTOBER_1, OCTOBER_1 + 30 * DAY, [BOB])
    assert [oddity.path.relative_to(store.layout.users).parts[0] for oddity in asked.oddities] == [str(BOB)]


@pytest.mark.root
def test_of_a_run_s_directory_only_their_files_are_read(tmp_path):
    for uid in (ALICE, BOB):
        os.chown(work(tmp_path / "ledger", uid, 3), uid, -1)
    found = gather([], [tmp_path], OCTOBER_1, OCTOBER_1 + 30 * DAY, [ALICE])
    assert [record.uid for record, _, _ in found.records] == [ALICE]
    assert found.num_files == 1


def test_a_file_that_was_last_written_long_before_the_window_is_not_read(store, tmp_path):
    for folder in (store.layout.ledger(os.getuid()), tmp_path / "run" / "ledger"):
        for day in (3, 9, 10, 20):
            work(folder, os.getuid(), day)
    window = OCTOBER_1 + 9 * DAY + 30, OCTOBER_1 + 30 * DAY
    for sources in (([store.layout.root], []), ([], [tmp_path / "run"])):
        found = gather(*sources, *window)
        assert sorted(record.job for record, _, _ in found.records) == ["10", "20", "9"]  # clocks may differ by a day
        assert found.num_files == 3


def test_a_file_of_a_rolled_up_month_that_grew_before_the_window_is_not_read(store):
    path = work(store.layout.ledger(os.getuid()), os.getuid(), 3)
    roll_up(store, "2026-10")
    path.write_bytes(path.read_bytes() + b"torn")
    assert gather([store.layout.root], [], OCTOBER_1 + 20 * DAY, OCTOBER_1 + 30 * DAY).num_files == 1
    os.utime(path, (OCTOBER_1 + 3 * DAY, OCTOBER_1 + 3 * DAY))
    assert gather([store.layout.root], [], OCTOBER_1 + 20 * DAY, OCTOBER_1 + 30 * DAY).num_files == 0
    assert gather([store.layout.root], [], OCTOBER_1, OCTOBER_1 + 30 * DAY).num_files == 1


def test_a_month_is_rolled_up_whole_whatever_its_files_say_of_when_they_were_written(store):
    os.utime(work(store.layout.ledger(os.getuid()), os.getuid(), 20), (0, 0))
    assert roll_up(store, "2026-10") == (1, [])


@pytest.mark.parametrize("name", [b"\xff.jsonl", b"1\x1b[2J.jsonl", b"1\n.jsonl"])
def test_names_that_no_writer_has_and_no_screen_should_show_are_left_out_and_the_month_is_rolled_up(store, name):
    path = work(store.layout.ledger(os.getuid()), os.getuid(), 3)
    odd = os.path.join(os.fsencode(path.parent), name)
    Path(os.fsdecode(odd)).write_bytes(path.read_bytes())
    for _ in range(2):
        found = gather([store.layout.root], [], OCTOBER_1, OCTOBER_1 + 30 * DAY)
        assert [(o.path, o.what) for o in found.oddities] == [
            (path.parent, "left out: names with characters that do not print")
        ]
        count, oddities = roll_up(store, "2026-10")
        assert (count, len(oddities)) == (1, 1)
