"""A ledger outlives the program: months rolled up before a field was there, and records with fields that come later."""

import json
import os

import duckdb
import msgspec
import pytest

from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.columns import COLUMNS
from hpckv.usage.gather import gather
from hpckv.usage.ledger import LedgerFile, digest, encode, records_in, verified_lines
from hpckv.usage.points import PointsConfig
from hpckv.usage.query import Accounts, Question
from hpckv.usage.record import Counters, Record
from hpckv.usage.rollup import roll_up

OCTOBER_1 = 1790812800.0
"""2026-10-01T00:00:00Z"""


@pytest.fixture
def store(tmp_path) -> StoreRoot:
    return StoreRoot.create(tmp_path / "store", StorePolicy.new())


def work(store: StoreRoot, job: str, *joules: float | None) -> LedgerFile:
    """A job with a record for each number."""
    pattern = Record.of_this_process(environ={"SLURM_JOB_ID": job}, gpu="NVIDIA H100")
    folder = store.layout.ledger(os.getuid())
    file = LedgerFile(folder, pattern, lambda path: path.mkdir(parents=True, exist_ok=True), now=OCTOBER_1)
    for n, energy_j in enumerate(joules, 1):
        more = Counters(requests=1, prompt_tokens=8, computed_tokens=8, energy_j=energy_j)
        file.append(more, now=OCTOBER_1 + 60 * n)
    file.close()
    return file


def energy_by_job(store: StoreRoot) -> dict[str, tuple[int, float | None]]:
    found = gather([store.layout.root], [], OCTOBER_1, OCTOBER_1 + 86400)
    assert not found.oddities
    columns = [COLUMNS[name] for name in ("jobid", "prompttok", "energy")]
    answer = Accounts(found, PointsConfig(), str).ask(Question(OCTOBER_1, OCTOBER_1 + 86400, columns=columns))
    return {job: (tokens, energy_j) for job, tokens, energy_j in answer.rows}


def test_what_nobody_measured_is_empty_and_not_0(store):
    work(store, "1", 2.5, None, 4.0)
    work(store, "2", None, None)
    assert energy_by_job(store) == {"1": (24, 6.5), "2": (16, None)}
    roll_up(store, "2026-10")
    assert energy_by_job(store) == {"1": (24, 6.5), "2": (16, None)}


@pytest.mark.parametrize("columns", ["* EXCLUDE energy_j", "*, 'x' AS a_field_of_the_future"])
def test_a_month_rolled_up_by_another_version_counts_beside_later_files(store, columns):
    work(store, "1", 2.5)
    roll_up(store, "2026-10")
    path = store.layout.rolled_up / "2026-10.parquet"
    con = duckdb.connect()
    ((text,),) = con.execute("SELECT value FROM parquet_kv_metadata(?) WHERE key = 'hpckv'", [str(path)]).fetchall()
    text = text.decode()
    con.execute(f"CREATE TABLE month AS SELECT {columns} FROM read_parquet('{path}')")
    path.unlink()
    con.execute(f"COPY month TO '{path}' (FORMAT parquet, KV_METADATA {{hpckv: '{text}'}})")
    assert json.loads(text)["files"]
    work(store, "2", 4.0)
    known = 2.5 if "future" in columns else None
    assert energy_by_job(store) == {"1": (8, known), "2": (8, 4.0)}


def test_a_record_with_unknown_fields_counts_and_one_without_energy_too(store):
    path = work(store, "1", 2.5).path
    line = json.loads(path.read_bytes())
    del line["crc"], line["energy_j"]
    for number, more in enumerate(({"prev": ""}, {"water_l": 3, "prev": None})):
        if more["prev"] is None:
            more["prev"] = digest(path.read_bytes()[:-1])
        body = msgspec.json.encode({**line, "seq": number, **{k: v for k, v in more.items() if k != "prev"}})
        body = body.replace(b',"prev":""', b"")[:-1] + b',"prev":"' + more["prev"].encode() + b'"'
        whole = body + b',"crc":"' + digest(body).encode() + b'"}\n'
        path.write_bytes(whole if number == 0 else path.read_bytes() + whole)
    odd: list = []
    records = list(records_in(path, verified_lines(path.read_bytes()), os.getuid(), odd.append))
    assert (len(records), odd) == (2, [])
    assert [record.energy_j for record in records] == [None, None]
    assert energy_by_job(store) == {"1": (16, None)}


def test_counters_with_and_without_energy_add_up_to_what_is_known():
    known, unknown = Counters(energy_j=3.0), Counters()
    assert (known + unknown).energy_j == (unknown + known).energy_j == 3.0
    assert (known - unknown).energy_j == 3.0
    assert (unknown - known).energy_j is None
    assert (Counters(energy_j=5.0) - known).energy_j == 2.0


def test_energy_below_0_is_no_energy():
    record = Record.of_this_process(environ={}).with_counters(Counters(energy_j=-1.0), seq=0, t0=0, t1=1, prev="")
    assert record.what_is_wrong == "a number out of range"
    assert encode(record).count(b'"energy_j":-1.0') == 1
