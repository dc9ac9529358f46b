"""Ledger files: what is written is read back, and whatever does not verify is left out and named."""

import json
import os

import pytest

from hpckv.usage import ledger
from hpckv.usage.gather import Gathered, LedgerPath, read_file
from hpckv.usage.ledger import LedgerFile, encode, records_in, verified_lines
from hpckv.usage.record import Counters, Record

OCTOBER_31 = 1793404800.0
"""2026-10-31T00:00:00Z"""
DAY = 86400.0


def counters(tokens: int = 10) -> Counters:
    return Counters(
        requests=1, prompt_tokens=tokens, cached={"shared": tokens - 4}, computed_tokens=4, by_writer={"7": tokens - 4}
    )


def ledger_file(folder, **more) -> LedgerFile:
    pattern = Record.of_this_process(environ={}, model="m", **more)
    return LedgerFile(folder, pattern, lambda path: path.mkdir(parents=True), now=OCTOBER_31)


def written(folder, count: int = 4) -> LedgerFile:
    file = ledger_file(folder)
    for n in range(count):
        file.append(counters(10 + n), now=OCTOBER_31 + 60 * (n + 1))
    return file


def read(path, content: bytes | None = None, uid: int | None = None):
    odd: list = []
    verified = verified_lines(path.read_bytes() if content is None else content)
    found = list(records_in(path, verified, uid or os.getuid(), odd.append))
    return found, [oddity.what for oddity in odd]


def test_records_come_back_and_follow_each_other(tmp_path):
    path = written(tmp_path).path
    found, odd = read(path)
    assert not odd
    assert [(r.seq, r.prompt_tokens, r.t1 - r.t0) for r in found] == [
        (0, 10, 60),
        (1, 11, 60),
        (2, 12, 60),
        (3, 13, 60),
    ]
    assert found[0].by_writer == {"7": 6}
    assert path.parent.name == "2026-10"
    assert path.stat().st_mode & 0o7777 == 0o640


def test_a_line_is_what_the_format_says(tmp_path):
    first, second = written(tmp_path, 2).path.read_bytes().splitlines()
    assert list(json.loads(first))[:6] == ["writer", "user", "uid", "v", "seq", "t0"]
    assert json.loads(first)["prev"] == ""
    assert json.loads(second)["prev"] == ledger.digest(first)
    body, _, crc = second.rpartition(b',"crc":"')
    assert crc == ledger.digest(body).encode() + b'"}'


def test_at_the_turn_of_a_month_a_writer_goes_on_in_the_next_folder(tmp_path):
    file = ledger_file(tmp_path)
    file.append(counters(), now=OCTOBER_31 + DAY - 1)
    file.append(counters(), now=OCTOBER_31 + DAY + 1)
    file.close()
    october, november = sorted(tmp_path.glob("*/*.jsonl"))
    assert (october.parent.name, november.parent.name) == ("2026-10", "2026-11")
    assert october.name == november.name
    assert [r.seq for path in (october, november) for r in read(path)[0]] == [0, 1]


@pytest.mark.parametrize("cut", [1, 100, 600])
def test_a_torn_last_line_costs_that_line_only(tmp_path, cut):
    path = written(tmp_path).path
    found, (what,) = read(path, path.read_bytes()[:-cut])
    assert [record.seq for record in found] == [0, 1, 2]
    assert "after record 2 do not verify" in what


def test_nothing_after_a_changed_byte_counts(tmp_path):
    path = written(tmp_path).path
    content = bytearray(path.read_bytes())
    at = content.index(b'"requests":1', len(content) // 2)
    content[at + 11] = ord("9")
    found, odd = read(path, bytes(content))
    assert len(found) == 2
    assert len(odd) == 1


def test_any_changed_byte_costs_its_line_and_what_follows(tmp_path):
    path = written(tmp_path).path
    whole = path.read_bytes()
    for at in range(len(whole)):
        content = bytearray(whole)
        content[at] ^= 1
        found, odd = read(path, bytes(content))
        assert [r.seq for r in found] == list(range(whole.count(b"\n", 0, at))), at
        assert len(odd) == 1


def test_lines_out_of_order_left_out_or_twice_do_not_verify(tmp_path):
    path = written(tmp_path).path
    a, b, c, d = path.read_bytes().splitlines(keepends=True)
    assert [r.seq for r in read(path, a + c + b + d)[0]] == [0]
    assert [r.seq for r in read(path, a + b + d)[0]] == [0, 1]
    assert [r.seq for r in read(path, a + b + b + c + d)[0]] == [0, 1]
    assert [r.seq for r in read(path, b + c + d)[0]] == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"uid": 7}, "says it is of uid 7"),
        ({"v": 2}, "version 2, this program knows 1"),
        ({"prompt_tokens": 11}, "11 prompt tokens are not the cached and the computed ones"),
        ({"output_tokens": -1}, "a number out of range"),
        ({"output_tokens": 2**60}, "a number out of range"),
        ({"gpu_s": -0.5}, "a number out of range"),
        ({"saved_gpu_s": 1e300}, "a number out of range"),
        ({"by_writer": {"7": -1}}, "a number out of range"),
        ({"by_writer": {"x": 6}}, "a number out of range"),
        ({"by_writer": {"1" * 20: 6}}, "a number out of range"),
        ({"restart": 10**19}, "a number out of range"),
        ({"keep_s": -1}, "a number out of range"),
        ({"num_gpus": 0}, "a number out of range"),
        ({"num_nodes": 0}, "a number out of range"),
        ({"array_task": -1}, "a number out of range"),
        ({"written_bytes": {"shared": -1}}, "a number out of range"),
        ({"cached": {"tape": 6}}, "unknown tiers: tape"),
        ({"t1": 1.0}, "ends before it begins"),
        ({"requests": "many"}, "not a record"),
    ],
)
def test_a_record_that_lies_or_is_not_understood_is_left_out_and_named(tmp_path, change, what):
    record = Record.of_this_process(environ={}).with_counters(
        counters(), seq=0, t0=OCTOBER_31, t1=OCTOBER_31 + 1, prev=""
    )
    for name, value in change.items():
        setattr(record, name, value)
    line = encode(record)
    after = ledger.encode(
        Record.of_this_process(environ={}).with_counters(
            counters(), seq=1, t0=OCTOBER_31, t1=OCTOBER_31 + 2, prev=ledger.digest(line[:-1])
        )
    )
    found, (said,) = read(tmp_path / "x.jsonl", line + after)
    assert what in said
    assert [r.seq for r in found] == [1]


MOST = {
    **dict.fromkeys(
        ("requests", "failed", "prompt_tokens", "computed_tokens", "output_tokens", "written_tokens"), 10**12
    ),
    **dict.fromkeys(("load_s", "prefill_s", "decode_s", "gpu_s", "saved_gpu_s"), 10**9),
    **dict.fromkeys(("num_gpus", "num_nodes"), 10**6),
    "energy_j": 10**13,
}
MOST_TOGETHER = {"read_bytes": 10**15, "written_bytes": 10**15, "by_writer": 10**12, "cached": 10**12}


@pytest.mark.parametrize("name", MOST)
def test_what_no_machine_does_in_one_record_does_not_count(name):
    record = Record.of_this_process(environ={})
    for value, wrong in ((MOST[name], ""), (MOST[name] + 1, "a number out of range")):
        setattr(record, name, value)
        record.prompt_tokens = record.computed_tokens = max(record.prompt_tokens, record.computed_tokens)
        assert record.what_is_wrong == wrong


@pytest.mark.parametrize("name", MOST_TOGETHER)
def test_nor_in_the_parts_of_a_record_together(name):
    record = Record.of_this_process(environ={})
    parts = ("7", "8") if name == "by_writer" else ("local", "shared")
    for more, wrong in ((0, ""), (1, "a number out of range")):
        setattr(record, name, {parts[0]: MOST_TOGETHER[name] // 2 + more, parts[1]: MOST_TOGETHER[name] // 2})
        record.prompt_tokens = sum(record.cached.values())
        assert record.what_is_wrong == wrong


def test_every_counter_has_its_limit():
    assert {*MOST, *MOST_TOGETHER} >= {*Counters.__struct_fields__}


def test_only_a_plain_file_of_the_right_owner_and_name_is_read(tmp_path):
    path = written(tmp_path).path
    for name, what in (("other", "another writer"), ("link", "left out"), ("fifo", "not a regular file")):
        odd = path.with_name(f"{name}.jsonl")
        if name == "other":
            odd.write_bytes(path.read_bytes())
            odd.chmod(0o640)
        elif name == "link":
            odd.symlink_to(path)
        else:
            os.mkfifo(odd)
        found = Gathered()
        read_file(LedgerPath(odd, os.getuid()), found)
        assert not found.records
        assert what in found.oddities[0].what
    found = Gathered()
    read_file(LedgerPath(path, os.getuid() + 1), found)
    assert not found.records
    assert "who is not trusted" in found.oddities[0].what


def test_a_short_write_ends_the_file(tmp_path, monkeypatch):
    file = written(tmp_path, 2)
    real = os.write
    monkeypatch.setattr(ledger.os, "write", lambda fd, data: real(fd, data[:50]))
    with pytest.raises(OSError, match="in part"):
        file.append(counters(), now=OCTOBER_31 + 500)
    monkeypatch.undo()
    found, odd = read(file.path)
    assert len(found) == 2
    assert "50 bytes after record 1" in odd[0]


def test_slurm_says_which_job_it_is():
    environ = {
        "SLURM_JOB_ID": "12",
        "SLURM_ARRAY_JOB_ID": "10",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_CLUSTER_NAME": "alps",
        "SLURM_JOB_ACCOUNT": "gk77",
        "SLURM_JOB_PARTITION": "gpu",
        "SLURM_JOB_QOS": "high",
        "USER": "somebody-else",
    }
    record = Record.of_this_process(rank=4, environ=environ)
    assert record.writer.startswith("10_3.2.4.")
    assert (record.job, record.array_job, record.array_task, record.restart) == ("12", "10", 3, 2)
    assert (record.cluster, record.account, record.partition, record.qos) == ("alps", "gk77", "gpu", "high")
    assert record.uid == os.getuid()
    assert record.user != "somebody-else"
