"""`hpckv submit` to a real Slurm: the answers come, whatever ends a job, and what must not go on by itself stops."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli import runs
from tests.cli.runs import answers, chat_lines, hpckv, texts, write_run
from tests.cluster.slurm import Slurm
from tests.cluster.test_batch_scripts import wait_for

pytestmark = [pytest.mark.root, pytest.mark.slurm, pytest.mark.mpi, pytest.mark.timeout(1800)]

TOP = Path(__file__).parents[2]
HPCKV = [sys.executable, "-m", "hpckv.cli.main"]
SMALL = ["-A", "root", "-p", "a100", "-c", "1", "--mem", "1500M", "-t", "10"]
PATIENCE_S = 120.0


def run(cluster: Slurm, *arguments: object, **environ: str) -> subprocess.CompletedProcess:
    """`hpckv ARGUMENTS` on the login node."""
    variables = {**cluster.environ, "OMP_NUM_THREADS": "1", **environ}
    return cluster.run(*HPCKV, *map(str, arguments), env=variables, timeout=300)


def submit(cluster: Slurm, run_file: Path, *flags: str, **environ: str) -> str:
    """The job's number, which is all that --parsable prints."""
    done = run(cluster, "submit", run_file, *SMALL, "--parsable", *flags, **environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().isdigit(), done.stdout
    return done.stdout.strip()


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted((folder / "out" / "logs").glob("*.log")))


def until(happened, folder: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end, logs(folder)
        time.sleep(0.02)


def long_run(folder: Path, checkpoint, output_tokens: int = 120) -> Path:
    """More than a start gets done before it is told to stop."""
    return runs.long_run(folder, checkpoint("llama", tokenizer=True), output_tokens)


def tell_that_time_is_up(cluster: Slurm, job: str) -> None:
    assert cluster.run("scancel", "--batch", "--signal=USR1", job).returncode == 0


def interrupt(cluster: Slurm, folder: Path, job: str) -> bytes:
    """In the middle of the answers; what was there then."""
    output = folder / "out" / "output.jsonl"
    until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 4, folder)
    before = output.read_bytes()
    tell_that_time_is_up(cluster, job)
    return before


def check(folder: Path, before: bytes, wanted: dict[str, str]) -> None:
    """The output went on from where it was, and is whole and right."""
    assert (folder / "out" / "output.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert before.count(b"\n") < len(wanted)
    assert texts(folder) == wanted


def submit_folder(folder: Path) -> Path:
    (found,) = (folder / "out" / "submit").iterdir()
    return found


@pytest.fixture(scope="module")
def wanted(tmp_path_factory, checkpoint) -> dict[str, str]:
    """What `long_run` answers when nobody interrupts it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert hpckv("run", long_run(folder, checkpoint), env=environ).returncode == 0
    return texts(folder)


def test_one_node_and_two_give_the_same_answers_and_wait_has_the_runs_exit_code(cluster, tmp_path, checkpoint):
    model = checkpoint("llama", tokenizer=True, num_key_value_heads=2)
    lines = [*chat_lines(8), {"custom_id": "bad", "body": {"messages": []}}]
    run_file = write_run(tmp_path, model, lines, sampling={"max_tokens": 6, "ignore_eos": True})
    refused = run(cluster, "submit", run_file, *SMALL)
    assert (refused.returncode, refused.stdout) == (65, "")
    assert "in.jsonl:9:" in refused.stderr
    several = ["-N", "2", "-n", "4", "--gpus-per-node", "2", "--set", "parallel.tp=2", "--set", "parallel.pp=2"]
    flags = [*SMALL, *several, "--skip-bad-lines", "--output", tmp_path / "many", "--parsable", "--wait"]
    many = run(cluster, "submit", run_file, *flags)
    one = run(
        cluster, "submit", run_file, *SMALL, "--skip-bad-lines", "--allow-errors", "--wait", "-o", f"{tmp_path}/own-%j"
    )
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("job ")
    assert many.returncode == 3, many.stderr  # one request has failed
    assert wait_for(cluster, many.stdout.strip()) == ("FAILED", "3:0")
    assert len(texts(tmp_path)) == 8
    assert texts(tmp_path) == texts(tmp_path, "many")
    assert '"hosts_of_ranks": [' in (tmp_path / "many" / "provenance.json").read_text()
    (log,) = tmp_path.glob("own-*")
    assert "8 answers" in log.read_text()
    assert "8 answers" in (tmp_path / "many" / "logs" / f"hpckv-{many.stdout.strip()}.log").read_text()


def test_in_a_folder_with_any_name_a_job_is_requeued_until_all_is_answered(cluster, tmp_path, checkpoint, wanted):
    folder = tmp_path / 'it\'s "odd"\n$HOME, 100%'
    folder.mkdir()
    job = submit(cluster, long_run(folder, checkpoint))
    before = interrupt(cluster, folder, job)
    assert wait_for(cluster, job) == ("COMPLETED", "0:0"), logs(folder)
    assert "requests are left; requeued (start 1 of at most 20)" in logs(folder)
    check(folder, before, wanted)
    mode = stat.S_IMODE(submit_folder(folder).stat().st_mode)
    assert mode == 0o700

    again = cluster.run(
        "sbatch", "--parsable", f"--output={folder}/again", str(submit_folder(folder) / f"{job}_submission.sh")
    )
    assert again.returncode == 0, again.stderr
    assert wait_for(cluster, again.stdout.strip()) == ("COMPLETED", "0:0")
    assert (folder / "again").read_text() == "hpckv: the run is finished; nothing to do\n"


def test_wait_stays_while_slurm_itself_starts_the_job_again(cluster, tmp_path, checkpoint, wanted):
    flags = [*SMALL, "-p", "low", "--continue", "none", "--parsable", "--wait", "--", "--nodelist=a100-0", "--requeue"]
    command = cluster.on_host("ctl", *HPCKV, "submit", str(long_run(tmp_path, checkpoint)), *flags)
    variables = {**cluster.environ, "OMP_NUM_THREADS": "1"}
    waiting = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    job = waiting.stdout.readline().strip()
    output = tmp_path / "out" / "output.jsonl"
    urgent = ["sbatch", "--account=root", "--partition=a100", "--nodelist=a100-0", "--exclusive", "--wrap=sleep 1"]
    for answered, ending in ((4, ["scontrol", "requeue", job]), (12, [*urgent, f"--output={tmp_path}/urgent"])):
        until(lambda: output.exists() and output.read_bytes().count(b"\n") >= answered, tmp_path)  # noqa: B023
        assert cluster.run(*ending).returncode == 0
    assert waiting.wait(PATIENCE_S) == 0, logs(tmp_path)
    waiting.stdout.close()
    assert wait_for(cluster, job) == ("COMPLETED", "0:0")
    starts = sorted((submit_folder(tmp_path) / "starts").iterdir())
    assert [path.read_text().split()[-2:] for path in starts] == [["75", "ended"], ["75", "ended"], ["0", "stop"]]
    assert texts(tmp_path) == wanted


def test_where_requeue_is_forbidden_another_job_goes_on_and_wait_follows_it(cluster, tmp_path, checkpoint, wanted):
    run_file = long_run(tmp_path, checkpoint)
    # A job that was submitted without the environment has what it needs in its script.
    flags = [*SMALL, "--continue", "chain", "--parsable", "--wait", "--", "--export=NONE"]
    variables = {**cluster.environ, "OMP_NUM_THREADS": "1"}
    command = cluster.on_host("ctl", *HPCKV, "submit", str(run_file), *flags)
    waiting = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    first = waiting.stdout.readline().strip()
    before = interrupt(cluster, tmp_path, first)
    assert waiting.wait(PATIENCE_S) == 0, logs(tmp_path)
    waiting.stdout.close()
    assert wait_for(cluster, first) == ("COMPLETED", "0:0")
    assert "goes on (start 2 of at most 20)" in logs(tmp_path)
    second = logs(tmp_path).partition("requests are left; job ")[2].split()[0]
    assert wait_for(cluster, second) == ("COMPLETED", "0:0")
    assert (submit_folder(tmp_path) / "jobs").read_text().split() == [first, second]
    check(tmp_path, before, wanted)


def test_jobs_of_an_array_work_on_one_run_together(cluster, tmp_path, checkpoint, wanted):
    run_file = long_run(tmp_path, checkpoint)
    done = run(cluster, "submit", run_file, *SMALL, "-a", "0-1", "--parsable", "--wait")
    assert done.returncode == 0, logs(tmp_path)
    assert texts(tmp_path) == wanted
    job = done.stdout.strip()
    names = {path.name for path in (tmp_path / "out" / "logs").glob("*.log")}
    assert names == {f"hpckv-{job}_0.log", f"hpckv-{job}_1.log"}
    begun = {path.name.partition(".")[0] for path in (submit_folder(tmp_path) / "starts").iterdir()}
    assert begun == {"0", "1"}


def test_after_so_many_starts_a_run_stops(cluster, tmp_path, checkpoint):
    run_file = long_run(tmp_path, checkpoint, 200)
    job = submit(cluster, run_file, HPCKV_ATTEMPTS="1")
    before = interrupt(cluster, tmp_path, job)
    assert wait_for(cluster, job) == ("FAILED", "75:0"), logs(tmp_path)
    assert "requests are left after 1 starts; not going on (HPCKV_ATTEMPTS)" in logs(tmp_path)
    assert (tmp_path / "out" / "output.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])


def test_two_starts_without_a_new_answer_stop_the_chain(cluster, tmp_path, checkpoint):
    run_file = long_run(tmp_path, checkpoint, 2000)
    job = submit(cluster, run_file, "--continue", "chain")
    starts = tmp_path / "out" / "logs" / "starts.jsonl"
    for number in (1, 2):
        until(lambda: starts.exists() and starts.read_bytes().count(b"\n") == number, tmp_path)  # noqa: B023
        tell_that_time_is_up(cluster, (submit_folder(tmp_path) / "jobs").read_text().split()[-1])
        assert wait_for(cluster, job) == (("COMPLETED", "0:0") if number == 1 else ("FAILED", "75:0")), logs(tmp_path)
        job = (submit_folder(tmp_path) / "jobs").read_text().split()[-1]
    assert "two starts in a row gave no new answer; not going on" in logs(tmp_path)
    assert cluster.run("squeue", "-h").stdout == ""


def test_when_the_time_of_all_starts_is_used_up_the_run_stops_by_itself(cluster, tmp_path, checkpoint):
    run_file = long_run(tmp_path, checkpoint, 2000)
    done = run(cluster, "submit", run_file, *SMALL, "--wait", "--set", "slurm.max_elapsed=0:06")
    assert done.returncode == 75, logs(tmp_path)
    assert "s of HPCKV_MAX_ELAPSED=0:06; not going on" in logs(tmp_path)


def test_a_run_that_is_submitted_from_inside_a_job_has_its_own_shape(cluster, tmp_path, checkpoint):
    model = checkpoint("llama", tokenizer=True)
    run_file = write_run(tmp_path, model, chat_lines(4), sampling={"max_tokens": 4})
    command = " ".join([*HPCKV, "submit", str(run_file), *SMALL, "--parsable"])
    outer = tmp_path / "outer.sh"
    outer.write_text(
        "#!/bin/bash\n"
        "export SBATCH_PARTITION=nowhere SBATCH_TIMELIMIT=1 SLURM_CPUS_PER_TASK=3 OMPI_COMM_WORLD_RANK=1 PMI_RANK=1\n"
        f"{command} >{tmp_path}/inner\n"
    )
    shape = ["--account=root", "--partition=a100", "--nodes=2", "--ntasks=4", "--mem=500M", "--time=5"]
    sent = cluster.run("sbatch", "--parsable", *shape, f"--output={tmp_path}/outer.log", str(outer))
    assert wait_for(cluster, sent.stdout.strip()) == ("COMPLETED", "0:0"), (tmp_path / "outer.log").read_text()
    inner = (tmp_path / "inner").read_text().strip()
    assert wait_for(cluster, inner) == ("COMPLETED", "0:0"), logs(tmp_path)
    shown = cluster.run("scontrol", "--oneliner", "show", "job", inner).stdout.split()
    assert {"NumNodes=1", "NumTasks=1", "CPUs/Task=1", "Partition=a100", "TimeLimit=00:10:00"} <= set(shown)
    assert len(answers(tmp_path)) == 4


def test_status_and_cancel_know_a_job_that_has_not_begun(cluster, tmp_path, checkpoint):
    model = checkpoint("llama", tokenizer=True)
    run_file, out = write_run(tmp_path, model, chat_lines(4)), tmp_path / "out"
    job = submit(cluster, run_file, "--", "--hold", "--comment=it's on hold")
    shown = json.loads(run(cluster, "status", out, "--json").stdout)
    assert (shown["state"], shown["requests"], shown["answered"], shown["starts"]) == ("pending", 4, 0, 0)
    assert [(one["job"], one["state"]) for one in shown["jobs"]] == [(job, "PENDING")]
    assert "Comment=it's on hold" in cluster.run("scontrol", "--oneliner", "show", "job", job).stdout
    assert run(cluster, "cancel", out).stdout == f"{job}: cancelled\n"
    assert wait_for(cluster, job)[0] == "CANCELLED"
    assert json.loads(run(cluster, "status", out, "--json").stdout)["state"] == "stopped"


def test_what_sbatch_refuses_is_one_line_and_leaves_nothing(cluster, tmp_path, checkpoint):
    run_file = write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(4))
    done = run(cluster, "submit", run_file, "-A", "nobody", "-p", "a100", "-t", "1")
    assert done.returncode == 69
    assert done.stderr.startswith("hpckv: sbatch: error: ")
    assert "Invalid account" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list((tmp_path / "out" / "submit").iterdir()) == []


def test_a_job_that_is_cancelled_while_somebody_waits_is_said_as_not_finished(cluster, tmp_path, checkpoint):
    run_file = write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(4))
    command = cluster.on_host("ctl", *HPCKV, "submit", str(run_file), *SMALL, "--parsable", "--wait", "--", "--hold")
    waiting = subprocess.Popen(
        command, env=cluster.environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    job = waiting.stdout.readline().strip()
    assert cluster.run("scancel", job).returncode == 0
    assert waiting.wait(PATIENCE_S) == 75
    waiting.stdout.close()
    assert os.listdir(tmp_path / "out" / "logs") == []


@pytest.mark.sharedfs
def test_ranks_of_two_nodes_work_in_the_image_that_the_run_file_names(site, sif, tmp_path):
    alice = site.people["alice"]
    folder = alice.home / 'it\'s "submitted", twice'
    shutil.copytree(TOP / "examples" / "recall-1m", folder / "model")
    lines = (TOP / "examples" / "catalogue.jsonl").read_text().splitlines(keepends=True)[:12]
    container = {"image": str(sif), "bind": [f"{site.home}/slurm:/data:ro"]}
    run_file = write_run(folder, Path("model"), "".join(lines).encode(), container=container, output="out")
    # Users cannot run this Python: root renders, and alice submits what was rendered.
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 0\n")
    (tmp_path / "sbatch").chmod(0o755)
    flags = [*SMALL, "-A", alice.project, "-N", "2", "--set", "parallel.pp=2", "--set", "sampling.max_tokens=8"]
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = hpckv("submit", run_file.name, *flags, cwd=folder, env=environ)
    assert done.returncode == 0, done.stderr
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, alice.name, alice.group)
    (submitted,) = (folder / "out" / "submit").iterdir()
    sent = site.run("alice", "sbatch", "--parsable", submitted / "0_submission.sh")
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.strip()
    assert site.run("alice", "ln", "-s", "0_submitted.pkl", submitted / f"{job}_submitted.pkl").returncode == 0
    said = folder / "out" / "logs" / f"hpckv-{job}.log"
    assert site.wait(job) == {("COMPLETED", "0:0")}, said.read_text()
    used = json.loads((folder / "out" / "provenance.json").read_text())
    assert (used["hosts_of_ranks"], used["container"]) == (["a100-0", "a100-1"], str(sif))
    known = map(json.loads, (TOP / "examples" / "catalogue_answers.jsonl").read_text().splitlines())
    right = {row["custom_id"]: row["answer"] for row in known}
    found = {custom_id: text.strip() for custom_id, text in texts(folder).items()}
    assert found == {custom_id: right[custom_id] for custom_id in found}
    assert len(found) == 12
    assert {path.name for path in alice.home.glob(".[a-z]*")} <= {".apptainer"}  # no cache went there
