"""What `hpckv acct` does with a site file and a store's disk: the balance, what files cost, sums for Prometheus."""

import json
import os
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.ledger import LedgerFile
from hpckv.usage.record import Counters, Record
from tests.cli.runs import hpckv

DAY = 86400.0


@pytest.fixture
def store(tmp_path) -> StoreRoot:
    """With two GPU hours in its ledger, ended a minute ago."""
    root = StoreRoot.create(tmp_path / "store", StorePolicy.new())
    pattern = Record.of_this_process(environ={"SLURM_JOB_ID": "7"}, gpu="NVIDIA H100", model="m")
    make = lambda path: path.mkdir(parents=True, exist_ok=True)  # noqa: E731
    now = time.time()
    file = LedgerFile(root.layout.ledger(os.getuid()), pattern, make, now=now - 120)
    more = Counters(
        requests=1, prompt_tokens=8, cached={"shared": 4}, computed_tokens=4, gpu_s=7200.0, saved_gpu_s=3600.0
    )
    file.append(more, now=now - 60)
    file.close()
    return root


def site(tmp_path: Path, **points) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(json.dumps({"points": {"prices": [{"per_gpu_hour": 3}], **points}}))
    return path


def ask(store: StoreRoot, *arguments, **options):
    return hpckv("acct", "--store", store.layout.root, "-S", "now-1day", *arguments, **options)


def test_the_balance_stands_beside_what_jobs_cost(store, tmp_path):
    points = site(tmp_path, balance="printf 'vision %s left\\n' 120.5")
    done = ask(store, "--balance", "--site", points)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["User", "GPUTime", "Points", "SavedPoints"]
    assert lines[2].split()[1:] == ["02:00:00", "6", "3"]
    assert lines[-1] == "vision 120.5 left"
    found = json.loads(ask(store, "--balance", "--site", points, "--json").stdout)
    assert (found["balance"], found["total"]["Points"]) == ("vision 120.5 left\n", 6.0)


def test_no_shell_reads_the_balance_command_and_no_terminal_obeys_it(store, tmp_path):
    victim = tmp_path / "victim"
    points = site(tmp_path, balance=f"printf '%b|' 'a\\033[2Jb' ; touch {victim} '$(touch {victim})' `id`")
    done = ask(store, "--balance", "--site", points)
    assert done.returncode == 0, done.stderr
    assert f"a?[2Jb|;|touch|{victim}|$(touch {victim})|`id`|" in done.stdout
    assert not victim.exists()


@pytest.mark.parametrize(
    ("balance", "code", "what"),
    [
        (None, 64, "no points.balance in the site file"),
        ("'", 64, "No closing quotation"),
        (" ", 64, "an empty command"),
        ("/nonexistent/points", 69, "/nonexistent/points: No such file"),
        ("sh -c 'echo not you >&2; exit 4'", 69, "sh ends with 4: not you"),
    ],
)
def test_a_balance_command_that_does_not_say_is_one_sentence(store, tmp_path, balance, code, what):
    done = ask(store, "--balance", "--site", site(tmp_path, balance=balance))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert what in done.stderr


def keep(store: StoreRoot, namespace: str, num_bytes: int, age_s: float) -> None:
    """A file of so many bytes, written so long ago. What is in it does not matter to its price."""
    path = store.layout.user(os.getuid()) / "seg" / namespace / f"{num_bytes}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(num_bytes)
    os.utime(path, (time.time() - age_s,) * 2)


def disk(store: StoreRoot, *arguments) -> list[dict]:
    done = ask(store, "--disk", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


def test_disk_costs_bytes_times_days_within_the_window(store, tmp_path):
    keep(store, "aa.0", 2 * 10**12, 3 * DAY)
    keep(store, "bb.0", 10**12, DAY / 4)
    points = site(tmp_path, disk_tb_day=0.1)
    (row,) = disk(store, "--site", points)
    assert row["TBDays"] == pytest.approx(2 * 1 + 0.25, abs=1e-3)
    assert row["DiskPoints"] == pytest.approx(0.225, abs=1e-4)
    assert row["PointsPerDay"] == pytest.approx(0.3, abs=1e-6)
    (row,) = disk(store, "--site", points, "-S", "now-10days", "--group-by", "user")
    assert row["TBDays"] == pytest.approx(2 * 3 + 0.25, abs=1e-3)
    du = json.loads(hpckv("store", "du", store.layout.root, "--json").stdout)
    assert [(entry["user"], entry["bytes"], entry["files"]) for entry in du] == [
        (row["User"], row["Size"], row["Files"])
    ]
    rows = disk(store, "--site", points, "--group-by", "namespace")
    assert [(row["Namespace"], row["Size"]) for row in rows[:2]] == [("aa.0", 2 * 10**12), ("bb.0", 10**12)]
    assert sum(row["Files"] for row in rows) == du[0]["files"]


def test_disk_as_a_table_has_a_total_and_says_where_no_price_is(store):
    keep(store, "aa.0", 10**12, DAY)
    done = ask(store, "--disk", "--group-by", "namespace", "-o", "namespace,size,pointsperday")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].split() == ["Namespace", "Size", "PointsPerDay"]
    assert "no points.disk_tb_day in the site file" in done.stderr
    assert ask(store, "--disk", "--group-by", "gpu").returncode == 64


def test_sums_for_prometheus_are_everybody_s_since_ever(store, tmp_path):
    path = tmp_path / "hpckv.prom"
    done = hpckv("acct", "--store", store.layout.root, "--prom", path, "--site", site(tmp_path))
    assert (done.returncode, done.stdout) == (0, "")
    found = {family.name: family.samples for family in text_string_to_metric_families(path.read_text())}
    assert [sample.value for sample in found["hpckv_prompt_tokens"]] == [8]
    assert {sample.labels["tier"]: sample.value for sample in found["hpckv_cached_tokens"]}["shared"] == 4
    assert [sample.value for sample in found["hpckv_points"]] == [6]
    assert ask(store, "--prom", tmp_path / "x.txt").returncode == 64
    assert ask(store, "--prom", tmp_path / "nowhere" / "x.prom").returncode == 73


@pytest.mark.parametrize(
    "flags", [("--disk", "-u", "root"), ("--prom", "x.prom", "-A", "a"), ("--prom", "x.prom", "-j", "7")]
)
def test_a_filter_that_would_be_in_vain_is_refused(store, flags):
    done = ask(store, *flags)
    assert (done.returncode, done.stdout) == (64, "")
    assert f"{flags[-2]} does not go with {flags[0]}" in done.stderr


def test_one_thing_at_a_time(store):
    done = ask(store, "--disk", "--balance")
    assert (done.returncode, "--disk and --balance: one at a time" in done.stderr) == (64, True)
