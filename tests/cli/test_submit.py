"""`hpckv submit` as a user types it, on a machine without Slurm; with one, tests/cluster has the same."""

import json
import os
import platform
import subprocess
import sys
import time

import pytest

from tests.cli.runs import chat_lines, hpckv, long_run, texts, write_run


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("HPCKV_", "SLURM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def tree(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_a_dry_run_prints_the_whole_script_and_writes_nothing(tmp_path, checkpoint):
    run_file = write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(2))
    before = tree(tmp_path)
    # A program that would be called.
    (tmp_path / "bin").mkdir()
    called = tmp_path / "called"
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\ntouch {called}\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    before = tree(tmp_path)
    environ = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = hpckv("submit", run_file, "-p", "gpu", "--dry-run", "--", "--exclusive", env=environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "#SBATCH --partition=gpu\n" in done.stdout
    assert "#SBATCH --exclusive\n" in done.stdout
    assert "hpckv_worker" in done.stdout
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--partiton", "gpu"], "No such option: --partiton"),
        (["-N", "two"], "Invalid value for '-N' / '--nodes'"),
        (["--executor", "cloud"], "'cloud' is not one of"),
        (["--set", "slurm.qoss=x"], "slurm.qoss: unknown key; did you mean 'qos'?"),
        (["-t", "tomorrow"], "'tomorrow' is no time as Slurm writes it"),
        (["gpu"], "gpu: not expected; options of sbatch stand after --"),
    ],
)
def test_a_wrong_flag_is_said_and_nothing_is_submitted(tmp_path, flags, said):
    run_file = write_run(tmp_path, tmp_path, chat_lines(1))
    done = hpckv("submit", run_file, *flags)
    assert done.returncode == 64
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_where_there_is_no_slurm_that_is_said(tmp_path, checkpoint):
    run_file = write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(1))
    done = hpckv("submit", run_file, env={**os.environ, "PATH": "/nowhere"})
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == "hpckv: no sbatch on this machine; --executor local runs it here\n"


def test_two_ranks_here_give_the_answers_of_one_and_the_command_does_not_wait_for_them(tmp_path, checkpoint):
    model = checkpoint("llama", tokenizer=True, num_key_value_heads=2)
    run_file = write_run(tmp_path, model, chat_lines(6), sampling={"max_tokens": 6, "ignore_eos": True})
    begun = hpckv("submit", run_file, "--executor", "local", "--set", "parallel.pp=2", "--parsable")
    assert begun.returncode == 0, begun.stderr
    assert begun.stdout.strip().isdigit()
    assert hpckv("run", run_file, "--output", tmp_path / "one").returncode == 0
    (folder,) = (tmp_path / "out" / "submit").iterdir()
    end = time.monotonic() + 120
    while len(list(folder.glob("code-*"))) < 2:
        assert time.monotonic() < end, "".join(path.read_text() for path in folder.glob("*.err"))
        time.sleep(0.05)
    assert [path.read_text() for path in sorted(folder.glob("code-*"))] == ["0\n", "0\n"]
    assert texts(tmp_path) == texts(tmp_path, "one")
    shown = json.loads(hpckv("status", tmp_path / "out", "--json").stdout)
    assert (shown["state"], shown["requests"], shown["answered"]) == ("done", 6, 6)


def test_a_run_here_is_known_from_the_first_moment_and_can_be_ended(tmp_path, checkpoint):
    run_file, out = long_run(tmp_path, checkpoint("llama", tokenizer=True), output_tokens=1500), tmp_path / "out"
    begun = hpckv("submit", run_file, "--executor", "local", "--parsable")
    assert begun.returncode == 0, begun.stderr
    shown = json.loads(hpckv("status", out, "--json").stdout)
    assert (shown["state"], shown["requests"]) == ("running", 60)
    (job,) = shown["jobs"]
    assert (job["job"], job["state"]) == (f"{platform.node()}:{begun.stdout.strip()}", "RUNNING")
    end = time.monotonic() + 120
    while not (out / "output.jsonl").exists() or not (out / "output.jsonl").read_bytes():
        assert time.monotonic() < end, "".join(path.read_text() for path in out.glob("submit/*/*.err"))
        time.sleep(0.05)
    assert hpckv("cancel", out).stdout == f"{job['job']}: cancelled\n"
    while json.loads(hpckv("status", out, "--json").stdout)["jobs"][0]["state"] == "RUNNING":
        assert time.monotonic() < end
    shown = json.loads(hpckv("status", out, "--json").stdout)
    assert (shown["state"], shown["jobs"][0]["exit_code"]) == ("stopped", "75:0")
    assert 0 < shown["answered"] < 60
    assert "no job of this run" in hpckv("cancel", out).stdout


def test_wait_and_debug_have_the_runs_exit_code(tmp_path, checkpoint):
    model = checkpoint("llama", tokenizer=True)
    lines = [*chat_lines(2), {"custom_id": "bad", "body": {"messages": []}}]
    run_file = write_run(tmp_path, model, lines)
    waited = hpckv("submit", run_file, "--executor", "local", "--skip-bad-lines", "--wait")
    assert waited.returncode == 3, waited.stderr
    # The setting of the environment was heeded when it was submitted, and a flag has more weight.
    environ = {**os.environ, "HPCKV_RUN_DIR": str(tmp_path / "elsewhere")}
    flags = ["--executor", "debug", "--skip-bad-lines", "--allow-errors", "--output", tmp_path / "here"]
    done = hpckv("submit", run_file, *flags, env=environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path) == texts(tmp_path, "here")
    assert not (tmp_path / "elsewhere").exists()


def test_help_works_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['hpckv', 'submit', '--help']\n"
        "from hpckv.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Example: hpckv submit" in done.stdout
