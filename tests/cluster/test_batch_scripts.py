"""The scripts of slurm/, submitted with sbatch to a real Slurm: the answers come, and what is left is done by the next start."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli import runs
from tests.cli.runs import chat_lines, hpckv, texts, write_run
from tests.cluster.slurm import Slurm

pytestmark = [pytest.mark.root, pytest.mark.slurm, pytest.mark.mpi]

TOP = Path(__file__).parents[2]
SMALL = ["--account=root", "--partition=a100", "--cpus-per-task=1", "--mem=1500M", "--time=10"]


def sbatch(cluster: Slurm, folder: Path, script: str, *arguments: object, flags: tuple = (), **environ: str) -> str:
    """Submit a script; the job's number."""
    command = ["sbatch", "--parsable", *SMALL, f"--output={folder}/log-%j", *flags, f"slurm/{script}"]
    variables = {**cluster.environ, "OMP_NUM_THREADS": "1", **environ}
    done = cluster.run(*command, *map(str, arguments), cwd=TOP, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(cluster: Slurm, job: str, patience_s: float = 120.0) -> tuple[str, str]:
    """A job's state and exit code once it is over."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        shown = cluster.run("scontrol", "--oneliner", "show", "job", job).stdout
        found = dict(part.partition("=")[::2] for part in shown.split())
        if found.get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            return found["JobState"], found["ExitCode"]
        time.sleep(0.2)
    raise AssertionError(f"job {job} is not over: {shown}")


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("log-*")))


def long_run(folder: Path, checkpoint, output_tokens: int = 120) -> Path:
    """More than a start gets done before it is told to stop."""
    return runs.long_run(folder, checkpoint("llama", tokenizer=True), output_tokens)


def interrupt(cluster: Slurm, folder: Path, job: str, *command: str) -> bytes:
    """In the middle of the answers run a command, or tell the batch script that its time is nearly up; what was there then."""
    output, end = folder / "out" / "output.jsonl", time.monotonic() + 120
    while not output.exists() or output.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < end, logs(folder)
        time.sleep(0.02)
    before = output.read_bytes()
    assert cluster.run(*(command or ("scancel", "--batch", "--signal=USR1", job))).returncode == 0
    return before


@pytest.fixture(scope="module")
def wanted(tmp_path_factory, checkpoint) -> dict[str, str]:
    """What `long_run` answers when nobody interrupts it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert hpckv("run", long_run(folder, checkpoint)).returncode == 0
    return texts(folder)


def check(folder: Path, before: bytes, wanted: dict[str, str]) -> None:
    """The output went on from where it was, and is whole and right."""
    assert (folder / "out" / "output.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert before.count(b"\n") < len(wanted)
    assert texts(folder) == wanted


def test_one_gpu_and_several_nodes_give_the_same_answers(cluster, tmp_path, checkpoint):
    model = checkpoint("llama", tokenizer=True, num_key_value_heads=2)
    run_file = write_run(tmp_path, model, chat_lines(8), sampling={"max_tokens": 6, "ignore_eos": True})
    one = sbatch(cluster, tmp_path, "single_a100.sh", run_file, HPCKV_RUN_DIR=str(tmp_path / "one"))
    assert wait_for(cluster, one) == ("COMPLETED", "0:0"), logs(tmp_path)
    layout = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
    many = sbatch(cluster, tmp_path, "multinode_tp_pp.sh", run_file, flags=layout, HPCKV_RUN_DIR=str(tmp_path / "many"))
    assert wait_for(cluster, many) == ("COMPLETED", "0:0"), logs(tmp_path)
    assert '"hosts_of_ranks": [' in (tmp_path / "many" / "provenance.json").read_text()
    assert len(texts(tmp_path, "one")) == 8
    assert texts(tmp_path, "one") == texts(tmp_path, "many")


def test_a_wrong_run_file_is_said_in_the_log_and_in_the_exit_code(cluster, tmp_path):
    job = sbatch(cluster, tmp_path, "single_a100.sh", tmp_path / "no such.yaml")
    assert wait_for(cluster, job) == ("FAILED", "66:0")
    assert "no such.yaml: no such file" in logs(tmp_path)


def test_a_job_whose_time_is_up_is_requeued_until_all_is_answered(cluster, tmp_path, checkpoint, wanted):
    run_file = long_run(tmp_path, checkpoint)
    job = sbatch(cluster, tmp_path, "single_a100.sh", run_file, HPCKV_RUN_DIR=str(tmp_path / "out"))
    before = interrupt(cluster, tmp_path, job)
    assert wait_for(cluster, job) == ("COMPLETED", "0:0"), logs(tmp_path)
    assert "requests are left; requeued (start 1 of at most 20)" in logs(tmp_path)
    assert "SIGUSR1: finishing this step" in logs(tmp_path)
    check(tmp_path, before, wanted)


def test_where_requeue_is_forbidden_another_job_goes_on(cluster, tmp_path, checkpoint, wanted):
    run_file = long_run(tmp_path, checkpoint)
    # The next job has no flags of a command line: all that it asks for stands in the script, or in the site's file.
    site = tmp_path / "site.sh"
    site.write_text(
        f". {TOP}/slurm/site/no-requeue.sh\n"
        f'[ -n "${{hpckv_in_job:-}}" ] || export HPCKV_SITE_SH={site} SBATCH_ACCOUNT=root SBATCH_PARTITION=a100\n'
    )
    script = (TOP / "slurm" / "single_a100.sh").read_text()
    for flag in (*SMALL[2:], f"--output={tmp_path}/log-%j"):
        name = flag.partition("=")[0]
        lines = [f"#SBATCH {flag}" if line.startswith(f"#SBATCH {name}=") else line for line in script.splitlines()]
        script = "\n".join(lines) + "\n"
    own = tmp_path / "mine.sh"
    own.write_text(script)
    variables = {**cluster.environ, "OMP_NUM_THREADS": "1", "HPCKV_HOME": str(TOP)}
    command = f". {site} && sbatch --parsable {own} {run_file}"
    done = cluster.run("bash", "-c", command, cwd=tmp_path, env=variables)
    assert done.returncode == 0, done.stderr
    first = done.stdout.strip()
    assert "Requeue=0" in cluster.run("scontrol", "--oneliner", "show", "job", first).stdout  # whatever the script says
    before = interrupt(cluster, tmp_path, first)
    assert wait_for(cluster, first) == ("COMPLETED", "0:0"), logs(tmp_path)
    said = logs(tmp_path)
    assert "goes on (start 2 of at most 20)" in said, said
    second = said.partition("requests are left; job ")[2].split()[0]
    assert wait_for(cluster, second) == ("COMPLETED", "0:0"), logs(tmp_path)
    check(tmp_path, before, wanted)


def test_without_continuation_the_job_says_how_to_go_on(cluster, tmp_path, checkpoint):
    run_file = long_run(tmp_path, checkpoint)
    job = sbatch(cluster, tmp_path, "single_a100.sh", run_file, HPCKV_CONTINUE="none")
    interrupt(cluster, tmp_path, job)
    assert wait_for(cluster, job) == ("FAILED", "75:0")
    assert "sbatch the same script again to go on" in logs(tmp_path)


def test_a_run_that_stands_still_is_stopped_though_the_script_does_not_know_its_directory(
    cluster, tmp_path, checkpoint
):
    job = sbatch(cluster, tmp_path, "single_a100.sh", long_run(tmp_path, checkpoint, 2000))
    starts, end = tmp_path / "out" / "logs" / "starts.jsonl", time.monotonic() + 240
    for number in (1, 2):
        while not starts.exists() or starts.read_bytes().count(b"\n") < number:
            assert time.monotonic() < end, logs(tmp_path)
            time.sleep(0.02)
        assert cluster.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    assert wait_for(cluster, job) == ("FAILED", "75:0"), logs(tmp_path)
    assert "requests are left; requeued (start 1 of at most 20)" in logs(tmp_path)
    assert "two starts in a row gave no new answer; not going on" in logs(tmp_path)
    noted = sorted((tmp_path / "out" / "logs").glob(f"starts-of-{job}/*"))
    assert [path.read_text().split()[-2:] for path in noted] == [["75", "requeue"], ["75", "stop"]]


def test_a_job_that_is_cancelled_keeps_its_answers_and_does_not_come_back(cluster, tmp_path, checkpoint):
    run_file, out = long_run(tmp_path, checkpoint, 2000), tmp_path / "out"
    job = sbatch(cluster, tmp_path, "single_a100.sh", run_file, HPCKV_RUN_DIR=str(out))
    command = [sys.executable, "-m", "hpckv.cli.main"]
    before = interrupt(cluster, tmp_path, job, "true")
    shown = json.loads(cluster.run(*command, "status", str(out), "--json", cwd=TOP).stdout)
    assert (shown["state"], shown["requests"], shown["starts"]) == ("running", 60, 1)
    assert [(one["job"], one["state"], one["reason"]) for one in shown["jobs"]] == [(job, "RUNNING", "a100-0")]
    done = cluster.run(*command, "cancel", str(out), cwd=TOP)
    assert done.stdout == f"{job}: cancelled\n", done.stderr
    assert wait_for(cluster, job)[0] == "CANCELLED"
    assert "requeued" not in logs(tmp_path)
    stopped = json.loads(cluster.run(*command, "status", str(out), "--json", cwd=TOP).stdout)
    assert (stopped["state"], stopped["jobs"][0]["state"].split()[0]) == ("stopped", "CANCELLED")
    assert cluster.run("squeue", "-h", "-j", job, "-t", "PENDING").stdout == ""
    assert (out / "output.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])


def test_a_job_that_makes_room_for_another_goes_on_when_that_is_over(cluster, tmp_path, checkpoint, wanted):
    run_file = long_run(tmp_path, checkpoint)
    low = ("--partition=low", "--nodelist=a100-0")
    job = sbatch(cluster, tmp_path, "preemptible.sh", run_file, flags=low, HPCKV_RUN_DIR=str(tmp_path / "out"))
    urgent = ["sbatch", "--account=root", "--partition=a100", "--nodelist=a100-0", "--exclusive", "--wrap=sleep 1"]
    before = interrupt(cluster, tmp_path, job, *urgent, f"--output={tmp_path}/urgent")
    assert wait_for(cluster, job) == ("COMPLETED", "0:0"), logs(tmp_path)
    assert "DUE TO PREEMPTION" in logs(tmp_path)
    check(tmp_path, before, wanted)


def test_scripts_are_clean():
    scripts = [
        *TOP.glob("slurm/*.sh"),
        *TOP.glob("slurm/lib/*.sh"),
        *TOP.glob("slurm/site/*.sh"),
        TOP / "slurm/bin/hpckv",
    ]
    assert scripts
    for script in scripts:
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    done = subprocess.run(
        ["shellcheck", "-x", "-s", "bash", *scripts], cwd=TOP / "slurm", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    for script in TOP.glob("slurm/*.sh"):
        assert os.access(script, os.X_OK)
        headers = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
        assert all(" # " in line for line in headers)  # each is explained
