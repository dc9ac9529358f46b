"""What was rolled up once counts for good, and what was odd then is said as long as it is so."""

import json
import os

import duckdb
import pytest

from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.columns import COLUMNS
from hpckv.usage.gather import CHANGED, gather
from hpckv.usage.ledger import LedgerFile, digest, encode
from hpckv.usage.points import PointsConfig
from hpckv.usage.query import Accounts, Question
from hpckv.usage.record import Counters, Record
from hpckv.usage.rollup import roll_up

OCTOBER_1 = 1790812800.0
"""2026-10-01T00:00:00Z"""
DAY = 86400.0


@pytest.fixture
def store(tmp_path) -> StoreRoot:
    return StoreRoot.create(tmp_path / "store", StorePolicy.new())


def pattern(job: str) -> Record:
    return Record.of_this_process(environ={"SLURM_JOB_ID": job})


def work(store: StoreRoot, who: Record, count: int = 3, *, tokens: int = 8, now: float = OCTOBER_1):
    """A job with so many records, in a file that is made anew; its path."""
    file = LedgerFile(
        store.layout.ledger(os.getuid()), who, lambda path: path.mkdir(parents=True, exist_ok=True), now=now
    )
    for n in range(count):
        file.append(Counters(requests=1, prompt_tokens=tokens, computed_tokens=tokens), now=now + 60 * (n + 1))
    file.close()
    return file.path


def tokens_by_job(store: StoreRoot) -> tuple[dict[str, int], list[str]]:
    """And what is odd."""
    found = gather([store.layout.root], [], OCTOBER_1, OCTOBER_1 + DAY)
    question = Question(OCTOBER_1, OCTOBER_1 + DAY, columns=[COLUMNS[name] for name in ("jobid", "prompttok")])
    rows = Accounts(found, PointsConfig(), str).ask(question).rows
    return dict(rows), [oddity.what for oddity in found.oddities]


def another(store, path, who, count: int, *, tokens: int) -> bytes:
    path.unlink()
    work(store, who, count, tokens=tokens)
    return path.read_bytes()


CHANGES = {
    "truncated": lambda store, path, who: path.write_bytes(path.read_bytes()[:700]),
    "emptied": lambda store, path, who: path.write_bytes(b""),
    "another": lambda store, path, who: another(store, path, who, 2, tokens=99),
    "another of the same size": lambda store, path, who: another(store, path, who, 3, tokens=9),
    "another that is longer": lambda store, path, who: another(store, path, who, 5, tokens=9),
    "another behind a link": lambda store, path, who: (path.unlink(), path.symlink_to("/dev/null")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_rolled_up_counts_whatever_became_of_its_file(store, change):
    who = pattern("1")
    path = work(store, who)
    work(store, pattern("2"), tokens=50)
    roll_up(store, "2026-10")
    expected = {"1": 24, "2": 150}
    assert tokens_by_job(store) == (expected, [])
    CHANGES[change](store, path, who)
    assert tokens_by_job(store)[0] == expected
    for _ in range(3):
        count, (oddity,) = roll_up(store, "2026-10")
        assert (count, oddity.path) == (6, path)
        assert "counted as it was rolled up" in oddity.what
        sums, (said, *more) = tokens_by_job(store)
        assert sums == expected
        assert "counted as it was rolled up" in said
        assert not more or "link" in change
    path.unlink()
    roll_up(store, "2026-10")
    assert tokens_by_job(store)[0] == expected


def test_a_longer_file_that_does_not_begin_with_what_was_rolled_up_is_not_taken(store):
    who = pattern("1")
    path = work(store, who)
    roll_up(store, "2026-10")
    another(store, path, who, 5, tokens=9)
    assert tokens_by_job(store) == ({"1": 24}, [CHANGED])


def test_a_file_that_is_whole_again_counts_with_what_it_has_more(store):
    path = work(store, pattern("1"), 5)
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    roll_up(store, "2026-10")
    path.write_bytes(b"")
    roll_up(store, "2026-10")
    path.write_bytes(whole)
    assert tokens_by_job(store) == ({"1": 40}, [])
    assert roll_up(store, "2026-10") == (5, [])
    assert tokens_by_job(store) == ({"1": 40}, [])


def with_a_newer_record(path, who: Record) -> None:
    content = path.read_bytes()
    prev = digest(content.splitlines()[-1])
    record = who.with_counters(Counters(), seq=99, t0=OCTOBER_1, t1=OCTOBER_1 + 999, prev=prev)
    record.v = 2
    path.write_bytes(content + encode(record))


def test_what_was_odd_is_said_after_the_roll_up_too_and_once(store):
    who, torn = pattern("1"), pattern("2")
    newer = work(store, who)
    with_a_newer_record(newer, who)
    path = work(store, torn)
    path.write_bytes(path.read_bytes()[:-5])
    sums, before = tokens_by_job(store)
    assert len(before) == 2
    for _ in range(2):
        _, oddities = roll_up(store, "2026-10")
        assert sorted(oddity.what for oddity in oddities) == sorted(before)
        again, said = tokens_by_job(store)
        assert (again, sorted(said)) == (sums, sorted(before))
    newer.unlink()
    path.unlink()
    again, said = tokens_by_job(store)
    assert (again, sorted(said)) == (sums, sorted(before))


def change_description(path, **changes) -> None:
    con = duckdb.connect()
    ((text,),) = con.execute("SELECT value FROM parquet_kv_metadata(?) WHERE key = 'hpckv'", [str(path)]).fetchall()
    text = json.dumps({**json.loads(text), **changes}).replace("'", "''")
    con.execute(f"CREATE TABLE month AS SELECT * FROM read_parquet('{path}')")
    path.unlink()
    con.execute(f"COPY month TO '{path}' (FORMAT parquet, KV_METADATA {{hpckv: '{text}'}})")


def test_a_month_rolled_up_by_another_version_is_not_used_and_not_written_over(store):
    path = work(store, pattern("1"))
    roll_up(store, "2026-10")
    rolled = store.layout.rolled_up / "2026-10.parquet"
    change_description(rolled, v=2)
    content = rolled.read_bytes()
    sums, (said,) = tokens_by_job(store)
    assert sums == {"1": 24}
    assert said == "not used, its month's files are read instead: version 2, this program knows 1"
    path.unlink()
    count, (oddity,) = roll_up(store, "2026-10")
    assert (count, oddity.what) == (0, "left as it is: version 2, this program knows 1")
    assert rolled.read_bytes() == content


def test_who_writes_nonsense_fills_nobody_s_screen(store):
    work(store, pattern("1"), 50, tokens=10**12 + 1)
    for _ in range(2):
        sums, said = tokens_by_job(store)
        assert sums == {}
        assert said == [*(f"line {n}: a number out of range" for n in range(1, 11)), "and 40 more that do not count"]
        roll_up(store, "2026-10")
