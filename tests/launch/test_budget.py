"""What all starts of a run together may cost: counted by slurm/lib/, with programs in Slurm's place."""

import re
import subprocess
import time

import pytest

from tests.launch.batch import TOP, batch


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_elapsed": "1:40"}, r"10\d s of HPCKV_MAX_ELAPSED=1:40"),
        ({"max_points": "1", "points_per_node_hour": "18"}, r"1\.0[0-4]\d of HPCKV_MAX_POINTS=1"),
    ],  # and the second in which this one began
)
def test_what_earlier_starts_used_counts_and_nothing_more_is_begun(tmp_path, settings, said):
    one = batch(tmp_path, **{"continue": "chain"}, **settings)
    folder = tmp_path / "submit" / "starts"
    folder.mkdir(parents=True)
    now = int(time.time())
    # 40 s on two nodes; 40 s by a job that was killed and begun again; 20 s to its limit by one that was killed.
    (folder / "0.00001.5").write_text(f"start 5 {now - 1000} 2 0 1\nend 5 {now - 960} 75 chain\n")
    (folder / "0.00002.6").write_text(f"start 6 {now - 900} 2 0 2\n")
    (folder / "0.00003.6").write_text(f"start 6 {now - 860} 2 {now - 840} 3\n")
    done = one.start("exit 0", job=9)
    assert done.returncode == 75
    assert re.search(f"what they may cost is spent: {said}; not going on", done.stderr), done.stderr
    assert one.called("srun") == []


def test_a_run_is_told_to_stop_when_its_points_are_spent(tmp_path):
    one = batch(tmp_path, **{"continue": "requeue", "max_points": "0.001", "points_per_node_hour": "1"})
    # 0.001 points of two nodes are 1.8 s.
    done = one.start("trap 'exit 75' USR1; for n in {1..500}; do sleep 0.1; done; exit 0")
    assert done.returncode == 75, done.stderr
    assert "of HPCKV_MAX_POINTS=0.001; not going on" in done.stderr
    assert one.called("scontrol") == []


def budget_left(tmp_path, *begun, **settings):
    """Seconds, a minute after starts of so many nodes have begun on 1000 points or seconds at most."""
    one = batch(tmp_path, **settings)
    one.program("date", "#!/bin/bash\necho 1060\n")
    folder = tmp_path / "starts"
    folder.mkdir()
    for job, nodes in enumerate(begun, start=1):
        (folder / f"{job}.00001.{job}").write_text(f"start {job} 1000 {nodes} 0 0\n")
    assigned = "".join(f"{name}={value}\n" for name, value in one.settings.items())
    script = f". {TOP}/slurm/lib/continue.sh\nhpckv_starts={folder}\n{assigned}hpckv_budget left"
    done = subprocess.run(
        ["bash", "-c", script], env=one.environ(1), capture_output=True, text=True, check=False, cwd=tmp_path
    )
    return int(done.stdout)


def test_starts_that_run_at_the_same_time_share_what_is_left(tmp_path):
    assert budget_left(tmp_path / "one", 1, max_elapsed="0:100") == 40
    assert budget_left(tmp_path / "four", 1, 1, 1, 1, max_elapsed="0:600") == 90  # of 360 s
    rate = {"max_points": "2", "points_per_node_hour": "6"}  # 1200 s of a node
    assert budget_left(tmp_path / "nodes", 1, 4, **rate) == 180  # of 900 s, for five nodes
    assert budget_left(tmp_path / "spent", 8, 16, **rate) == 0


def test_a_start_that_began_later_counts_too(tmp_path):
    one = batch(tmp_path, **{"continue": "requeue", "max_elapsed": "1:00"})
    # Another task of the array, which has used everything by now.
    begins = f'echo "start 2 $(($(date +%s) - 60)) 1 0 0" >"{tmp_path}/submit/starts/1.00001.2"'
    step = f"trap 'exit 75' USR1; {begins}; for n in {{1..500}}; do sleep 0.1; done; exit 0"
    done = one.start(step, hpckv_look_s="1")
    assert done.returncode == 75, done.stderr
    assert "of HPCKV_MAX_ELAPSED=1:00; not going on" in done.stderr


def test_arrays_of_one_pool_share_it_and_keep_their_tasks_apart(tmp_path):
    caps = {"continue": "chain", "max_elapsed": "1:00", "run_dir": f"{tmp_path}/run"}
    one = batch(tmp_path, is_submitted=False, **caps)
    pool = {"HPCKV_POOL": "pool-1", "SLURM_ARRAY_TASK_ID": "0"}
    finished = one.start("answer; exit 0", job=4, SLURM_ARRAY_JOB_ID="4", **pool)
    assert finished.returncode == 0, finished.stderr
    other = one.start("answer; exit 75", job=6, SLURM_ARRAY_JOB_ID="6", **pool)
    assert "nothing to do" not in other.stderr
    handed_on = dict(line.partition("=")[::2] for line in one.called("sbatch.env") if line.startswith("HPCKV_"))
    assert handed_on["HPCKV_POOL"] == "pool-1"
    (folder,) = (tmp_path / "run" / "logs").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["4-0.00001.4", "6-0.00001.6"]
    (folder / "4-0.00001.4").write_text("start 4 1000 1 0 0\nend 4 1060 75 requeue\n")
    third = one.start("exit 0", job=6, SLURM_ARRAY_JOB_ID="6", **pool)
    assert (third.returncode, "of HPCKV_MAX_ELAPSED=1:00; not going on" in third.stderr) == (75, True)


def test_caps_that_cannot_be_kept_are_refused(tmp_path):
    one = batch(tmp_path, is_submitted=False, max_elapsed="1")
    done = one.start("exit 0")
    assert (done.returncode, one.called("srun")) == (64, [])
    assert "need HPCKV_RUN_DIR" in done.stderr


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("01:00:00", 3600),
        ("1-0", 86400),
        ("1-02:03", 93780),
        ("2-0:0:1", 172801),
        ("x", ""),
    ],
)
def test_times_as_slurm_writes_them(tmp_path, written, seconds):
    one = batch(tmp_path)
    script = f"hpckv_folder=x; . {tmp_path}/lib.sh; hpckv_seconds '{written}'"
    (tmp_path / "lib.sh").write_text(f". {one.environ(1)['HPCKV_HOME']}/slurm/lib/continue.sh")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(seconds)
