"""Adding a ledger up any number of times gives the same: a copy of a store or of a run beside it changes no sum."""

import os
import shutil
from pathlib import Path

import pytest

from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.columns import COLUMNS
from hpckv.usage.gather import gather
from hpckv.usage.ledger import LedgerFile
from hpckv.usage.points import PointsConfig
from hpckv.usage.query import Accounts, Question
from hpckv.usage.record import Counters, Record
from hpckv.usage.rollup import roll_up

OCTOBER_1 = 1790812800.0
"""2026-10-01T00:00:00Z"""
DAY = 86400.0


def work(ledger: Path, job: str, count: int) -> Path:
    pattern = Record.of_this_process(environ={"SLURM_JOB_ID": job})
    file = LedgerFile(ledger, pattern, lambda path: path.mkdir(parents=True, exist_ok=True), now=OCTOBER_1)
    for n in range(count):
        file.append(Counters(requests=1, prompt_tokens=8, computed_tokens=8), now=OCTOBER_1 + 60 * (n + 1))
    file.close()
    return file.path


@pytest.fixture
def sources(tmp_path) -> dict[str, Path]:
    """A store with two jobs, and a run that has one of them and one of its own; and a copy of each."""
    store = StoreRoot.create(tmp_path / "store", StorePolicy.new())
    path = work(store.layout.ledger(os.getuid()), "1", 3)
    work(store.layout.ledger(os.getuid()), "2", 4)
    work(tmp_path / "run" / "ledger", "3", 5)
    shutil.copy(path, tmp_path / "run" / "ledger" / "2026-10")
    for name in ("store", "run"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-copy")
    return {path.name: path for path in tmp_path.iterdir()}


def tokens_by_job(sources: dict[str, Path], names: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Of the sources with these names; and what is odd."""
    given = [sources[name] for name in names.split()]
    stores = [path for path in given if path.name.startswith("store")]
    found = gather(stores, [path for path in given if path not in stores], OCTOBER_1, OCTOBER_1 + DAY)
    question = Question(OCTOBER_1, OCTOBER_1 + DAY, columns=[COLUMNS[name] for name in ("jobid", "prompttok")])
    rows = Accounts(found, PointsConfig(), str).ask(question).rows
    return dict(rows), [(oddity.path.name, oddity.what) for oddity in found.oddities]


def once(sources: dict[str, Path], name: str, count: int) -> str:
    return f"the same ledgers as in {sources[name]}, counted once: {count}"


@pytest.mark.parametrize("rolled", ["", "store", "store-copy", "store store-copy"])
def test_a_copy_of_a_store_counts_once_rolled_up_or_not(sources, rolled):
    for name in rolled.split():
        roll_up(StoreRoot.open(sources[name]), "2026-10")
    expected = {"1": 24, "2": 32}
    assert tokens_by_job(sources, "store store") == (expected, [])
    said = [("store-copy", once(sources, "store", 2))]
    assert tokens_by_job(sources, "store store-copy") == (expected, said)
    said = [("store", once(sources, "store-copy", 2))]
    assert tokens_by_job(sources, "store-copy store") == (expected, said)


def test_what_only_one_of_them_has_counts(sources):
    roll_up(StoreRoot.open(sources["store-copy"]), "2026-10")
    work(sources["store-copy"] / "u" / str(os.getuid()) / "ledger", "4", 1)
    assert tokens_by_job(sources, "store store-copy")[0] == {"1": 24, "2": 32, "4": 8}
    shutil.rmtree(sources["store"] / "u")
    (sources["store"] / "u").mkdir()
    assert tokens_by_job(sources, "store store-copy") == ({"1": 24, "2": 32, "4": 8}, [])


def test_a_copy_of_a_run_counts_once_also_beside_a_store_that_has_it(sources):
    assert tokens_by_job(sources, "run run-copy") == (
        {"1": 24, "3": 40},
        [("run-copy", once(sources, "run", 2))],
    )
    assert tokens_by_job(sources, "store run run-copy") == (
        {"1": 24, "2": 32, "3": 40},
        [
            ("run", once(sources, "store", 1)),
            ("run-copy", once(sources, "store", 1)),
            ("run-copy", once(sources, "run", 1)),
        ],
    )


def test_a_file_of_which_nothing_counts_hides_no_other(sources):
    for path in (sources["run"] / "ledger").glob("*/1.*"):
        path.write_bytes(b"torn")
    sums, said = tokens_by_job(sources, "run run-copy")
    assert sums == {"1": 24, "3": 40}
    assert (("run-copy", once(sources, "run", 1))) in said
