"""`hpckv acct` on what runs have really written: the sums of the output, of the ledger and of the table are the same."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from hpckv.usage import columns
from tests.cli.runs import answers, chat_lines, hpckv, write_run


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint("llama", tokenizer=True, num_key_value_heads=2)


def served(*folders) -> dict[str, int]:
    """What outputs say."""
    usages = [body["usage"] for folder in folders for body in answers(folder).values()]
    parts = {
        name: sum(usage["hpckv"][name] for usage in usages)
        for name in ("device", "host", "local", "shared", "computed")
    }
    return {
        "Requests": len(usages),
        "PromptTok": sum(usage["prompt_tokens"] for usage in usages),
        "OutTok": sum(usage["completion_tokens"] for usage in usages),
        "DeviceTok": parts["device"],
        "HostTok": parts["host"],
        "LocalTok": parts["local"],
        "SharedTok": parts["shared"],
        "Computed": parts["computed"],
    }


def total(*arguments) -> dict:
    wanted = "Requests,PromptTok,OutTok,DeviceTok,HostTok,LocalTok,SharedTok,Computed"
    done = hpckv("acct", "-a", "-S", "now-1day", "--json", "-o", wanted, *arguments)  # it may be midnight
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["oddities"] == []
    return found["total"]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory, model):
    """A store, and two runs of the same requests."""
    folder = tmp_path_factory.mktemp("acct")
    places = []
    for name in ("cold", "warm"):
        (folder / name).mkdir()
        run_file = write_run(folder / name, model, chat_lines(12), store={"shared": str(folder / "kv"), "write": "all"})
        assert hpckv("run", run_file).returncode == 0
        places.append(folder / name)
    return folder / "kv", places


def test_the_table_the_ledger_and_the_output_agree_to_the_token(two_runs):
    store, places = two_runs
    assert total("--store", store) == served(*places)
    for place, job in zip(places, job_ids(store), strict=True):
        assert total("--store", store, "-j", job) == served(place)
    assert served(places[1])["SharedTok"] > 0


def job_ids(store) -> list[str]:
    return hpckv("acct", "--store", store, "-n", "-P", "-o", "jobid").stdout.split()


def test_who_is_owed_what(two_runs):
    store, places = two_runs
    (row,) = json.loads(hpckv("acct", "--store", store, "--group-by", "writer", "--json").stdout)["rows"]
    assert row["LoadedTok"] == served(places[1])["SharedTok"]
    assert (row["ByOthers"], row["Readers"], row["Jobs"]) == (0, 1, 1)


def test_the_default_table_is_one_line_a_job_with_a_total(two_runs):
    store, _ = two_runs
    lines = hpckv("acct", "--store", store).stdout.splitlines()
    assert lines[0].split() == columns.DEFAULT
    assert len(lines) == 6
    assert "llama" in lines[2]


def test_formats(two_runs):
    store, _ = two_runs
    fields = "User%3,Requests%-6,Hit%"
    bare = hpckv("acct", "--store", store, "-n", "-o", fields).stdout.splitlines()
    assert bare[0].startswith(f"{hpckv_user()[:2]}+ 12     ") or bare[0].startswith(f"{hpckv_user()} 12     ")
    plain = hpckv("acct", "--store", store, "-P", "-o", "requests,prompttok").stdout.splitlines()
    assert plain[0] == "Requests|PromptTok"
    ended = hpckv("acct", "--store", store, "-p", "--delimiter", ";", "-o", "requests").stdout.splitlines()
    assert ended == ["Requests;", "12;", "12;"]
    rows = list(csv.DictReader(io.StringIO(hpckv("acct", "--store", store, "--csv").stdout)))
    assert [row["Requests"] for row in rows] == ["12", "12"]
    assert (
        hpckv("acct", "--store", store, "-P", "-n", "-o", "prompttok", "--units", "k").stdout.split()[0].endswith("K")
    )
    widths = [hpckv("acct", "--store", store, "-o", field).stdout.splitlines()[1] for field in ("Hit%10", "Hit%%10")]
    assert widths == ["-" * 10] * 2
    environ = {**os.environ, "HPCKV_ACCT_FORMAT": "requests", "HPCKV_STORE": str(store)}
    assert hpckv("acct", "-P", env=environ).stdout.split() == ["Requests", "12", "12"]


def test_the_environment_s_columns_are_taken_where_they_are_known(two_runs):
    store, _ = two_runs

    def ask(text: str, *arguments):
        return hpckv("acct", "--store", store, "-P", *arguments, env={**os.environ, "HPCKV_ACCT_FORMAT": text})

    assert ask("Requests,SavedGPU", "--group-by", "writer").stdout.split()[0] == "|".join(columns.WRITER_DEFAULT)
    assert ask("Writer,SavedGPU%12").stdout.split()[0] == "|".join(columns.DEFAULT)
    assert ask("SavedGPU,Writer", "--group-by", "pair").stdout.split()[0] == "SavedGPU|Writer"
    wrong = ask("Requests,Nix")
    assert wrong.returncode == 64
    assert wrong.stderr.endswith("HPCKV_ACCT_FORMAT Nix: no such column; hpckv acct -e lists them\n")
    assert ask("Nix", "-o", "Requests").stdout.split() == ["Requests", "12", "12"]


def hpckv_user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def test_every_column_is_defined():
    said = hpckv("acct", "-e").stdout
    assert [line.split()[0] for line in said.splitlines()] == [column.name for column in columns.COLUMNS.values()]
    assert "LoadedTok" in hpckv("acct", "-e", "--group-by", "writer").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["-S", "someday"], 64, "no time as sacct reads it"),
        (["-o", "Jobid,Nix"], 64, "-o Nix: no such column; hpckv acct -e lists them"),
        (["-o", "User", "--group-by", "writer"], 64, "-o User: no such column; hpckv acct -e --group-by writer lists"),
        (["--group-by", "moon"], 64, "--group-by moon: expected one of job, user"),
        (["-u", "no-such-user-here"], 64, "no such user"),
        (["--units", "X"], 64, "--units X: expected one of K, M"),
        (["--site", "/nonexistent.yaml"], 66, "no such file"),
    ],
)
def test_what_is_wrong_is_one_line(two_runs, arguments, code, what):
    done = hpckv("acct", "--store", two_runs[0], *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert what in done.stderr


def test_without_a_store_somebody_must_say_whose_ledger(tmp_path):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HPCKV_")}
    done = hpckv("acct", env=environ)
    assert (done.returncode, "whose ledger?" in done.stderr) == (64, True)
    assert hpckv("acct", "--store", tmp_path).returncode == 69


def test_points_come_from_the_site_file(two_runs, tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("points: {prices: [{partition: gpu, per_gpu_hour: 1}, {per_node_hour: 720, gpus_per_node: 2}]}")
    rows = json.loads(hpckv("acct", "--store", two_runs[0], "--site", site, "--json", "-o", "GPUTime,Points").stdout)[
        "rows"
    ]
    assert all(row["Points"] == pytest.approx(row["GPUTime"] / 10) for row in rows)
    site.write_text("points: {prices: [{partition: gpu, per_gpu_hour: 1}]}")
    done = hpckv("acct", "--store", two_runs[0], "--site", site)
    assert "are of no price" in done.stderr
    site.write_text("points: {prices: [{per_node_hour: 1}]}")
    done = hpckv("acct", "--store", two_runs[0], "--site", site)
    assert (done.returncode, "gpus_per_node belong together" in done.stderr) == (64, True)


def test_a_run_without_a_store_keeps_its_ledger_itself(tmp_path, model):
    run_file = write_run(tmp_path, model, chat_lines(5))
    assert hpckv("run", run_file).returncode == 0
    assert total("--run", tmp_path / "out") == served(tmp_path)


def kill_after(run_file, count: int, *more: str) -> None:
    """Start a run, and end it without a word when it has so many answers."""
    command = [sys.executable, "-m", "hpckv.cli.main", "run", str(run_file), *more]
    output, end = run_file.parent / "out" / "output.jsonl", time.monotonic() + 120
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while (output.read_bytes().count(b"\n") if output.exists() else 0) < count and job.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)


def test_what_a_killed_run_had_done_counts_once_wherever_its_files_are_by_now(tmp_path, model):
    sampling = {"max_tokens": 24, "ignore_eos": True}
    run_file = write_run(tmp_path, model, chat_lines(40), sampling=sampling, engine={"max_requests": 2})
    kill_after(run_file, 8)
    moved = tmp_path / "elsewhere" / "out"
    moved.parent.mkdir()
    (tmp_path / "out").rename(moved)
    os.utime(moved / "output.jsonl", (time.time() + 9e5, time.time() + 9e5))  # no answer came then
    last = hpckv("run", run_file, "--output", moved)
    assert "that had not been recorded" in last.stderr
    assert total("--run", moved) == served(moved.parent)
    shown = json.loads(hpckv("acct", "-S", "now-1day", "--run", moved, "--json", "-o", "GPUTime,Elapsed").stdout)[
        "total"
    ]
    assert shown["GPUTime"] <= 3600


def test_no_token_is_lost_with_one_of_several_that_is_killed(tmp_path, model):
    sampling = {"max_tokens": 120, "ignore_eos": True}
    queue = {"lease_s": 3.0, "items": 16}
    run_file = write_run(tmp_path, model, chat_lines(40), sampling=sampling, queue=queue, engine={"max_requests": 1})
    command = [sys.executable, "-m", "hpckv.cli.main", "run", str(run_file), "--join"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        end = time.monotonic() + 120
        while sum(part.read_bytes().count(b"\n") for part in tmp_path.glob("out/queue/1/parts/*")) < 8:
            assert time.monotonic() < end
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
    last = hpckv("run", run_file, "--join")
    assert (last.returncode, "that had not been recorded" in last.stderr) == (0, True), last.stderr
    assert total("--run", tmp_path / "out") == served(tmp_path)


def test_where_a_ledger_is_gone_nothing_is_counted_twice(tmp_path, model):
    sampling = {"max_tokens": 24, "ignore_eos": True}
    run_file = write_run(tmp_path, model, chat_lines(40), sampling=sampling, engine={"max_requests": 2})
    kill_after(run_file, 8)
    shutil.rmtree(tmp_path / "out" / "ledger")
    before = len((tmp_path / "out" / "output.jsonl").read_bytes().splitlines())
    last = hpckv("run", run_file)
    assert (last.returncode, "not there any more" in last.stderr) == (0, True)
    (row,) = json.loads(hpckv("acct", "-S", "now-1day", "--run", tmp_path / "out", "--json", "-o", "Requests").stdout)[
        "rows"
    ]
    assert 40 - before - 1 <= row["Requests"] <= 40 - before + 1


def test_no_token_is_lost_with_a_run_that_is_killed(tmp_path, model):
    sampling = {"max_tokens": 24, "ignore_eos": True}
    store = {"shared": str(tmp_path / "kv"), "write": "all"}
    run_file = write_run(tmp_path, model, chat_lines(40), store=store, sampling=sampling, engine={"max_requests": 2})
    for count in (4, 12):
        kill_after(run_file, count)
    last = hpckv("run", run_file)
    assert last.returncode == 0, last.stderr
    assert "that had not been recorded" in last.stderr
    assert total("--store", tmp_path / "kv") == served(tmp_path)
    assert len(answers(tmp_path)) == 40


def test_only_a_month_that_is_over_is_rolled_up(two_runs):
    done = hpckv("acct", "--store", two_runs[0], "--rollup")
    assert (done.returncode, done.stdout) == (0, "no month is over\n")
