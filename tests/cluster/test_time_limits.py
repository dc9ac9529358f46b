"""Jobs that Slurm itself ends: `--time=1` runs out for real.

Slurm looks at limits every half minute, so a run would have to compute for longer than that. Instead each worker is stopped, as a
suspended job's is, once it has some answers, and goes on when Slurm's signal waits for it. All jobs wait at the same time. Four
that start at once may have no answer for a while, so the signal comes no earlier than after half of the minute.
"""

import signal
import time
from pathlib import Path

import pytest

from tests.cli.runs import hpckv, texts
from tests.cluster.processes import has_pending, send, workers
from tests.cluster.slurm import Slurm
from tests.cluster.test_batch_scripts import SMALL, check, logs, long_run, sbatch, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slurm, pytest.mark.mpi, pytest.mark.timeout(900)]

TOP = Path(__file__).parents[2]
A_MINUTE = ("--time=1", "--gpus-per-node=0")
PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def wanted(tmp_path_factory, checkpoint) -> dict[str, str]:
    """What `long_run` answers when nobody interrupts it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert hpckv("run", long_run(folder, checkpoint)).returncode == 0
    return texts(folder)


def until(happened, folder: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end, all_logs(folder)
        time.sleep(0.05)


def all_logs(folder: Path) -> str:
    return logs(folder) + "".join(path.read_text() for path in sorted((folder / "out" / "logs").glob("*.log")))


def stop_in_the_middle(folder: Path, job: str) -> tuple[list[int], bytes]:
    """The job's worker, standing still, and its answers so far."""
    output = folder / "out" / "output.jsonl"
    until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 4, folder)
    found = workers(SLURM_JOB_ID=job)
    send(found, signal.SIGSTOP)
    return found, output.read_bytes()


def submit_requeued(cluster: Slurm, folder: Path, run_file: Path) -> str:
    flags = (*A_MINUTE, "--signal=B:USR1@30")
    return sbatch(cluster, folder, "single_a100.sh", run_file, flags=flags, HPCKV_RUN_DIR=str(folder / "out"))


def submit_chained(cluster: Slurm, folder: Path, run_file: Path) -> str:
    """With the site's shell code, which the next job is submitted with too."""
    site = folder / "site.sh"
    site.write_text(
        f". {TOP}/slurm/site/no-requeue.sh\n"
        f'[ -n "${{hpckv_in_job:-}}" ] || export HPCKV_SITE_SH={site} SBATCH_ACCOUNT=root SBATCH_PARTITION=a100\n'
    )
    text = (TOP / "slurm" / "chain.sh").read_text()
    asked = [*SMALL[2:-1], *A_MINUTE, "--signal=B:USR1@30", f"--output={folder}/log-%j"]
    for flag in asked:
        name = flag.partition("=")[0]
        text = "".join(
            f"#SBATCH {flag}\n" if line.startswith(f"#SBATCH {name}=") else line for line in text.splitlines(True)
        )
    (folder / "mine.sh").write_text(text)
    environ = {**cluster.environ, "OMP_NUM_THREADS": "1", "HPCKV_HOME": str(TOP), "HPCKV_RUN_DIR": str(folder / "out")}
    done = cluster.run("bash", "-c", f". {site} && sbatch --parsable {folder}/mine.sh {run_file}", env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submit_by_hpckv(cluster: Slurm, folder: Path, run_file: Path) -> str:
    """submitit's executor, with our own signal, in its own script."""
    command = [
        str(TOP / ".venv" / "bin" / "hpckv"),
        "submit",
        str(run_file),
        "--parsable",
        "--set",
        "slurm.signal_s=30",
    ]
    asked = ["-A", "root", "-p", "v100", "-c", "1", "--mem", "1500M", "-t", "1"]
    done = cluster.run(*command, *asked, env={**cluster.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submit_killed(cluster: Slurm, folder: Path, run_file: Path) -> str:
    """Too late for anything: its worker never goes on, and is killed."""
    flags = (*A_MINUTE, "--partition=h100", "--signal=B:USR1@1")
    return sbatch(
        cluster,
        folder,
        "single_a100.sh",
        run_file,
        flags=(*flags, "--constraint=h100"),
        HPCKV_RUN_DIR=str(folder / "out"),
    )


SUBMIT = {"requeue": submit_requeued, "chain": submit_chained, "submit": submit_by_hpckv, "killed": submit_killed}


def test_when_the_time_is_really_up_nothing_is_lost_whoever_submitted(cluster: Slurm, tmp_path, checkpoint, wanted):
    folders = {name: tmp_path / name for name in SUBMIT}
    jobs, stopped = {}, {}
    for name, submit in SUBMIT.items():
        folders[name].mkdir()
        jobs[name] = submit(cluster, folders[name], long_run(folders[name], checkpoint))
    for name, job in jobs.items():
        stopped[name] = stop_in_the_middle(folders[name], job)

    for name in ("requeue", "chain", "submit"):
        (pid,), _ = stopped[name]
        until(lambda: has_pending(pid, signal.SIGUSR1), folders[name])  # noqa: B023
        send([pid], signal.SIGCONT)
    for name in ("requeue", "submit"):
        assert wait_for(cluster, jobs[name], PATIENCE_S) == ("COMPLETED", "0:0"), all_logs(folders[name])
        assert "requests are left; requeued (start 1 of at most 20)" in all_logs(folders[name])
    assert wait_for(cluster, jobs["chain"], PATIENCE_S) == ("COMPLETED", "0:0"), all_logs(folders["chain"])
    following = all_logs(folders["chain"]).partition("requests are left; job ")[2].split()[0]
    assert wait_for(cluster, following, PATIENCE_S) == ("COMPLETED", "0:0"), all_logs(folders["chain"])

    assert wait_for(cluster, jobs["killed"], PATIENCE_S)[0] == "TIMEOUT"
    assert "DUE TO TIME LIMIT" in all_logs(folders["killed"])
    assert "requeued" not in all_logs(folders["killed"])
    again = submit_killed(cluster, folders["killed"], folders["killed"] / "run.yaml")
    assert wait_for(cluster, again, PATIENCE_S) == ("COMPLETED", "0:0"), all_logs(folders["killed"])
    for name, (_, before) in stopped.items():
        check(folders[name], before, wanted)
