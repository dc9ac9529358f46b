"""Every sum that `acct` gives is exact, against a made-up past whose truth is known: rolled up and not, with parts of it gone."""

import os
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.columns import COLUMNS, WRITER_COLUMNS
from hpckv.usage.gather import Gathered, gather
from hpckv.usage.ledger import LedgerFile, digest, encode
from hpckv.usage.points import PointsConfig, Price
from hpckv.usage.query import Accounts, Question
from hpckv.usage.record import TIERS, Counters, Record
from hpckv.usage.rollup import closed_months, roll_up

pytestmark = pytest.mark.root

JULY = datetime(2026, 7, 1, tzinfo=UTC).timestamp()
END = datetime(2026, 11, 15, tzinfo=UTC).timestamp()
UIDS = (2001, 2002, 2003)
NAMES = {2001: "alice", 2002: "bob", 2003: "carol", **{uid: f"user{uid}" for uid in range(2004, 2041)}}
SUMS = ("requests", "prompt_tokens", "computed_tokens", "output_tokens", "written_tokens")


@dataclass
class Truth:
    """What was done, added up by whoever did it."""

    by_user: dict[int, Counter] = field(default_factory=dict)
    by_job: dict[str, Counter] = field(default_factory=dict)
    by_model: dict[str, Counter] = field(default_factory=dict)
    by_day: dict[str, Counter] = field(default_factory=dict)
    by_writer: Counter = field(default_factory=Counter)
    total: Counter = field(default_factory=Counter)

    def add(self, record: Record, job: str) -> None:
        counts = Counter({name: getattr(record, name) for name in SUMS})
        counts.update({tier: record.cached.get(tier, 0) for tier in TIERS})
        day = f"{datetime.fromtimestamp(record.t1):%F}"
        keyed = (self.by_user, record.uid), (self.by_job, job), (self.by_model, record.model), (self.by_day, day)
        for sums, key in keyed:
            sums.setdefault(key, Counter()).update(counts)
        self.total.update(counts)
        self.by_writer.update({int(uid): tokens for uid, tokens in record.by_writer.items()})


def random_counters(rng: random.Random, uids: Sequence[int] = UIDS) -> Counters:
    cached = {tier: rng.randrange(1000) for tier in TIERS if rng.random() < 0.5}
    loaded = sum(count for tier, count in cached.items() if tier != "device")
    mine = rng.randrange(loaded + 1)
    by_writer = {str(rng.choice(uids)): mine, "2001": loaded - mine} if loaded else {}
    computed = rng.randrange(1000)
    return Counters(
        requests=rng.randrange(10),
        prompt_tokens=sum(cached.values()) + computed,
        cached=cached,
        computed_tokens=computed,
        output_tokens=rng.randrange(100),
        written_tokens=rng.randrange(100),
        gpu_s=60.0,
        saved_gpu_s=rng.random(),
        by_writer=by_writer,
    )


def make_past(store: StoreRoot, *, num_writers: int, num_records: int, seed: int = 0) -> Truth:
    """Jobs of three users, with arrays and restarts, over four and a half months."""
    rng, truth = random.Random(seed), Truth()
    for number in range(num_writers):
        uid = rng.choice(UIDS)
        environ = {"SLURM_JOB_ID": str(number), "SLURM_RESTART_COUNT": str(number % 3)}
        job = str(number)
        if number % 4 == 0:
            environ |= {"SLURM_ARRAY_JOB_ID": str(number // 16), "SLURM_ARRAY_TASK_ID": str(number % 16)}
            job = f"{number // 16}_{number % 16}"
        model = rng.choice(("small", "large"))
        pattern = Record.of_this_process(environ=environ, model=model, gpu="NVIDIA H100", project="vision")
        pattern.uid = uid
        t = JULY + rng.random() * (END - JULY - 70 * num_records)
        file = LedgerFile(
            store.layout.ledger(uid), pattern, lambda path: path.mkdir(parents=True, exist_ok=True), now=t
        )
        for _ in range(num_records):
            t += 60.0
            counters = random_counters(rng)
            file.append(counters, now=t)
            truth.add(pattern.with_counters(counters, seq=0, t0=t - 60, t1=round(t, 3), prev=""), job)
        file.close()
    give_away(store, UIDS)
    return truth


def give_away(store: StoreRoot, uids: Sequence[int]) -> None:
    """Each user's folder to that user."""
    for uid in uids:
        store.layout.user(uid).mkdir(exist_ok=True)
        for path in [store.layout.user(uid), *store.layout.user(uid).rglob("*")]:
            os.chown(path, uid, -1)


@pytest.fixture
def store(tmp_path) -> StoreRoot:
    return StoreRoot.create(tmp_path / "store", StorePolicy.new())


def everything(store: StoreRoot) -> Gathered:
    return gather([store.layout.root], [], JULY - 1, END + 1)


def ask(store: StoreRoot, found: Gathered | None = None, **more):
    question = Question(**{"start": JULY - 1, "end": END + 1, **more})
    found = found or gather([store.layout.root], [], question.start, question.end)
    points = PointsConfig(prices=[Price(gpu="H100", per_node_hour=12.0, gpus_per_node=4)])
    return Accounts(found, points, NAMES.__getitem__).ask(question), found


def rows_by(store: StoreRoot, found: Gathered, group: str, key: str) -> dict[str, Counter]:
    wanted = [
        key,
        "Requests",
        "PromptTok",
        "Computed",
        "OutTok",
        "WrittenTok",
        "DeviceTok",
        "HostTok",
        "LocalTok",
        "SharedTok",
    ]
    answer, _ = ask(store, found, group=group, columns=[COLUMNS[name.lower()] for name in wanted])
    names = (*SUMS, *TIERS)
    return {row[0]: Counter(dict(zip(names, row[1:], strict=True))) for row in answer.rows}


def check(store: StoreRoot, truth: Truth, *, num_oddities: int = 0) -> None:
    found = everything(store)
    assert rows_by(store, found, "user", "UID") == {str(uid): sums for uid, sums in truth.by_user.items()}
    assert rows_by(store, found, "job", "JobID") == truth.by_job
    assert rows_by(store, found, "model", "Model") == truth.by_model
    assert rows_by(store, found, "day", "Day") == truth.by_day
    answer, _ = ask(store, found, group="writer", columns=[WRITER_COLUMNS[name] for name in ("writer", "loadedtok")])
    assert dict(answer.rows) == {NAMES[uid]: tokens for uid, tokens in truth.by_writer.items()}
    answer, _ = ask(store, found, group="user")
    columns = [column.name for column in answer.columns]
    assert answer.total[columns.index("PromptTok")] == truth.total["prompt_tokens"]
    assert len(found.oddities) == num_oddities


def test_sums_are_the_truth_also_rolled_up_and_with_users_folders_gone(store):
    truth = make_past(store, num_writers=60, num_records=20)
    check(store, truth)
    months = closed_months(store, END)
    assert months == ["2026-07", "2026-08", "2026-09", "2026-10"]
    for month in months:
        roll_up(store, month)
    check(store, truth)
    assert ask(store)[1].num_files < 20
    shutil.rmtree(store.layout.ledger(2002) / "2026-08")
    check(store, truth)
    roll_up(store, "2026-08")
    check(store, truth)


def test_a_file_that_grew_after_its_month_was_rolled_up_counts_whole(store):
    truth = make_past(store, num_writers=12, num_records=5)
    path = min(store.layout.ledger(2001).glob("2026-07/*.jsonl"))
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    roll_up(store, "2026-07")
    path.write_bytes(whole)
    check(store, truth)


def test_a_roll_up_that_is_damaged_or_not_the_owner_s_is_not_used(store):
    truth = make_past(store, num_writers=12, num_records=5)
    roll_up(store, "2026-07")
    (path,) = store.layout.rolled_up.glob("*")
    good = path.read_bytes()
    path.chmod(0o640)
    path.write_bytes(good[:-100])
    answer, found = ask(store, group="user")
    assert "not used" in found.oddities[0].what
    assert sum(row[2] for row in answer.rows) == truth.total["prompt_tokens"]
    path.write_bytes(good)
    os.chown(path, 2003, -1)
    answer, found = ask(store, group="user")
    assert "who is not trusted" in found.oddities[0].what
    assert sum(row[2] for row in answer.rows) == truth.total["prompt_tokens"]


def test_a_record_found_afterwards_counts_until_its_writer_says_the_same_itself(store):
    truth = make_past(store, num_writers=6, num_records=5)
    path = max(store.layout.ledger(2001).glob("*/*.jsonl"), key=lambda p: p.stat().st_size)
    lines = path.read_bytes().splitlines(keepends=True)
    last = digest(lines[-1][:-1])
    import msgspec

    old = msgspec.json.decode(lines[-1], type=Record)
    lost = Counters(requests=1, prompt_tokens=8, computed_tokens=8)
    late = old.with_counters(lost, seq=old.seq + 1, t0=old.t1, t1=old.t1 + 1, prev="")
    after = path.with_name(f"{path.stem}.after-{late.seq}.jsonl")
    after.write_bytes(encode(late))
    os.chown(after, 2001, -1)
    assert sum(row[2] for row in ask(store, group="user")[0].rows) == truth.total["prompt_tokens"] + 8
    roll_up(store, path.parent.name)
    assert sum(row[2] for row in ask(store, group="user")[0].rows) == truth.total["prompt_tokens"] + 8
    own = old.with_counters(random_counters(random.Random(1)), seq=late.seq, t0=old.t1, t1=old.t1 + 2, prev=last)
    with Path(path).open("ab") as file:
        file.write(encode(own))
    total = truth.total["prompt_tokens"] + own.prompt_tokens
    assert sum(row[2] for row in ask(store, group="user")[0].rows) == total


def test_what_is_asked_for_is_what_is_counted(store):
    truth = make_past(store, num_writers=40, num_records=5)
    answer, _ = ask(store, uids=[2002], group="user", columns=[COLUMNS["user"], COLUMNS["prompttok"]])
    assert answer.rows == [["bob", truth.by_user[2002]["prompt_tokens"]]]
    answer, _ = ask(store, jobs=["1_0", "3"], columns=[COLUMNS["jobid"], COLUMNS["prompttok"]])
    assert dict(answer.rows) == {job: truth.by_job[job]["prompt_tokens"] for job in ("1_0", "3")}
    answer, _ = ask(store, jobs=["1"], group="project", columns=[COLUMNS["prompttok"]])
    assert answer.rows == [
        [sum(sums["prompt_tokens"] for job, sums in truth.by_job.items() if job == "1" or job.startswith("1_"))]
    ]
    assert ask(store, partitions=["gpu"])[0].rows == []
    day = max(truth.by_day)
    start = datetime.strptime(day, "%Y-%m-%d").timestamp()
    answer, _ = ask(store, start=start, end=start + 86400, group="project", columns=[COLUMNS["prompttok"]])
    assert answer.rows == [[truth.by_day[day]["prompt_tokens"]]]


def test_no_sum_overflows_whatever_was_rolled_up_before_numbers_had_limits(store):
    most, found = 2**53, Gathered()
    counters = Counters(
        requests=most, prompt_tokens=most, cached={"shared": most}, by_writer={"2001": most, "2002": most}
    )
    pattern = Record.of_this_process(environ={"SLURM_JOB_ID": "1"})
    pattern.uid = 2001
    for seq in range(2000):
        record = pattern.with_counters(counters, seq=seq, t0=JULY, t1=JULY + 60, prev="")
        found.records.append((record, "2001/1.jsonl", False))
    columns = [COLUMNS[name] for name in ("requests", "hittok", "owntok", "otherstok")]
    assert ask(store, found, columns=columns)[0].rows == [[2000 * most] * 4]
    answer, _ = ask(store, found, group="writer", columns=[WRITER_COLUMNS[name] for name in ("writer", "loadedtok")])
    assert dict(answer.rows) == {"alice": 2000 * most, "bob": 2000 * most}


def test_points_are_gpu_hours_at_the_price_that_fits(store):
    make_past(store, num_writers=12, num_records=5)
    answer, _ = ask(store, group="project", columns=[COLUMNS["gputime"], COLUMNS["points"]])
    assert answer.rows == [[pytest.approx(12 * 5 * 60.0), pytest.approx(12 * 5 * 60 / 3600 * 3.0)]]
    assert answer.unpriced == 0


def test_a_ten_turn_conversation_costs_what_prompt_caching_is_priced_at(tmp_path):
    """13,000 tokens asked ten times at 3 dollars a million, reads at a tenth, writes at 1.25: 0.39 uncached, 0.08385 cached."""
    store = StoreRoot.create(tmp_path / "store", StorePolicy.new())
    pattern = Record.of_this_process(environ={})
    folder = store.layout.ledger(os.getuid())
    file = LedgerFile(folder, pattern, lambda path: path.mkdir(parents=True), now=JULY)
    file.append(
        Counters(requests=1, prompt_tokens=13_000, computed_tokens=13_000, written_tokens=13_000), now=JULY + 60
    )
    file.append(Counters(requests=9, prompt_tokens=117_000, cached={"shared": 117_000}), now=JULY + 120)
    found = gather([store.layout.root], [], JULY, END)
    columns = [COLUMNS["prompttok"], COLUMNS["pricedtok"]]
    answer = Accounts(found, PointsConfig(), str).ask(Question(JULY, END, columns=columns))
    ((prompt, priced),) = answer.rows
    assert prompt * 3e-6 == pytest.approx(0.39, rel=1e-12)
    assert priced * 3e-6 == pytest.approx(0.08385, rel=1e-12)
