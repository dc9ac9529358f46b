"""Going on when the time is up: slurm/lib/, with programs in Slurm's place. What real Slurm does is in tests/cluster."""

import os
import re
import signal
import subprocess
import time

import pytest

from tests.launch.batch import TOP, batch


def last_word(one):
    """The exit code that the only start notes, and what goes on."""
    (start,) = (one.folder / "submit" / "starts").iterdir()
    return " ".join(start.read_text().split()[-2:])


def starts(one):
    return sorted(path.name for path in (one.folder / "submit" / "starts").iterdir())


@pytest.mark.parametrize("code", [0, 3, 64, 66, 69, 73, 78, 137])
def test_the_runs_exit_code_is_the_jobs(tmp_path, code):
    one = batch(tmp_path, **{"continue": "requeue"})
    done = one.start(f"exit {code}")
    assert (done.returncode, done.stderr) == (code, "")
    assert one.called("scontrol") == []


def test_a_step_gets_its_cores_and_the_whole_environment(tmp_path):
    one = batch(tmp_path)
    assert one.start("exit 0").returncode == 0
    assert one.called("srun") == [
        *("--mpi=pmi2", "--export=ALL", "--job-name=hpckv-run", "--cpus-per-task=3"),
        *("python3", "-m", "submitit"),
    ]


def test_requeue(tmp_path):
    one = batch(tmp_path, **{"continue": "requeue"})
    done = one.start("answer; exit 75")
    assert one.called("scontrol") == ["requeue", "1"]
    assert done.stderr == "hpckv: requests are left; requeued (start 1 of at most 20)\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("Requested operation is presently disabled for job 1", "HPCKV_CONTINUE=chain submits another instead"),
        ("Job/step already completing or completed for job 1", "the same command again goes on from here"),
        ("Job is no longer pending execution for job 1", "the same command again goes on from here"),
    ],
)
def test_where_requeue_fails_slurms_words_are_said_and_what_to_do(tmp_path, words, said):
    one = batch(tmp_path, **{"continue": "requeue"})
    one.program("scontrol", f"#!/bin/bash\necho >>\"$CALLS/asked\"; echo '{words}' >&2; exit 1\n")
    done = one.start("answer; exit 75")
    assert done.returncode == 75
    assert f"({words}); {said}" in done.stderr
    assert one.called("asked") == [""]
    assert last_word(one) == "75 stop"


AWAY = [
    "slurm_requeue error: Unable to contact slurm controller (connect failure)",
    "Socket timed out on send/recv operation",
    "Connection refused",
]


def once(what, words, then):
    """A program of Slurm's whose controller is away when it is called for the first time."""
    first = f'[ -s "$CALLS/{what}" ] || {{ echo x >"$CALLS/{what}"; echo \'{words}\' >&2; exit 1; }}'
    return f'#!/bin/bash\n{first}\nprintf "%s\\n" "$@" >>"$CALLS/{what}"\n{then}\n'


@pytest.mark.parametrize("words", AWAY)
def test_a_controller_that_does_not_answer_is_asked_again(tmp_path, words):
    requeued = batch(tmp_path / "requeue", **{"continue": "requeue"})
    requeued.program("scontrol", once("scontrol", words, 'kill "$(cat "$CALLS/script")"'))
    done = requeued.start("answer; exit 75")
    assert requeued.called("scontrol") == ["x", "requeue", "1"]
    assert f"hpckv: {words}; Slurm is asked again in 1 s\n" in done.stderr
    assert last_word(requeued) == "75 requeue"

    chained = batch(tmp_path / "chain", **{"continue": "chain"})
    chained.program("sbatch", once("sbatch", words, "echo sbatch: warning >&2; echo '78;cluster'"))
    chained.program("squeue", "#!/bin/bash\necho '5 /elsewhere/script.sh'\n")
    done = chained.start("answer; exit 75")
    assert (done.returncode, last_word(chained)) == (0, "75 chain"), done.stderr
    assert "sbatch: warning\nhpckv: requests are left; job 78 goes on" in done.stderr


def test_a_job_that_was_submitted_though_no_answer_came_is_the_next(tmp_path):
    one = batch(tmp_path, **{"continue": "chain"})
    one.program("sbatch", once("sbatch", AWAY[1], "echo 79"))
    one.program("squeue", f"#!/bin/bash\necho '5 /elsewhere/script.sh'; echo '78 {tmp_path}/script.sh'\n")
    done = one.start("answer; exit 75")
    assert (done.returncode, one.called("sbatch")) == (0, ["x"])
    assert "job 78 goes on" in done.stderr


def test_no_answer_to_the_end_is_said_with_what_to_do(tmp_path):
    one = batch(tmp_path, **{"continue": "chain"})
    one.program("sbatch", "#!/bin/bash\necho x >>\"$CALLS/sbatch\"; echo 'Connection refused' >&2; exit 1\n")
    done = one.start("answer; exit 75", SLURM_JOB_END_TIME=str(int(time.time()) + 1))
    assert done.returncode == 75
    assert (
        "the next job cannot be submitted (Connection refused); the same command again goes on from here" in done.stderr
    )
    assert last_word(one) == "75 stop"


def test_a_job_that_slurm_itself_has_requeued_is_requeued(tmp_path):
    one = batch(tmp_path, **{"continue": "requeue"})
    one.program("scontrol", "#!/bin/bash\necho 'Job is pending execution for job 1' >&2; exit 1\n")
    one.program("sleep", '#!/bin/bash\nkill "$(cat "$CALLS/script")"\n')  # as Slurm does while the script waits for it
    done = one.start("answer; exit 75")
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert last_word(one) == "75 requeue"
    assert done.stderr == "hpckv: requests are left; requeued (start 1 of at most 20)\n"


def test_a_job_that_is_cancelled_while_it_asks_again_stays_cancelled(tmp_path):
    one = batch(tmp_path, **{"continue": "chain"})
    one.program("sbatch", once("sbatch", "Connection refused", "echo 78"))
    one.program("sleep", '#!/bin/bash\nkill "$(cat "$CALLS/script")"; exec /bin/sleep "$@"\n')
    done = one.start("answer; exit 75")
    assert (done.returncode, one.called("sbatch"), last_word(one)) == (75, ["x"], "75 ended"), done.stderr


def test_a_chain_submits_the_same_script_without_this_jobs_variables(tmp_path):
    one = batch(tmp_path, **{"continue": "chain"})
    inherited = {"SBATCH_PARTITION": "x", "SRUN_DEBUG": "1", "PMI_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "MINE": "1"}
    done = one.start("answer; exit 75", **inherited)
    assert done.returncode == 0
    assert "requests are left; job 77 goes on (start 2 of at most 20)" in done.stderr
    assert one.called("sbatch") == ["--parsable", "--dependency=afterany:1", str(tmp_path / "script.sh")]
    names = {line.partition("=")[0] for line in one.called("sbatch.env")}
    assert "MINE" in names
    assert {name for name in names if re.match("SLURM|SBATCH|SRUN|PMI|OMPI", name)} == {"SLURM_CONF"}
    assert "HPCKV_RUN_DIR" not in names
    assert os.readlink(tmp_path / "submit" / "77_submitted.pkl") == "1_submitted.pkl"
    assert (tmp_path / "submit" / "jobs").read_text() == "77\n"


def test_a_script_of_ones_own_is_submitted_again_with_its_arguments_and_counted(tmp_path):
    one = batch(tmp_path, is_submitted=False, **{"continue": "chain", "attempts": "2"})
    first = one.start("exit 75")
    assert first.returncode == 0, first.stderr
    assert one.called("sbatch")[-2:] == [str(tmp_path / "script.sh"), "run.yaml"]
    handed_on = dict(line.partition("=")[::2] for line in one.called("sbatch.env") if line.startswith("HPCKV_"))
    assert (handed_on["HPCKV_ATTEMPT"], handed_on["HPCKV_FIRST_JOB"]) == ("2", "1")
    second = one.start("exit 75", job=77, **handed_on)
    assert second.returncode == 75
    assert "requests are left after 2 starts; not going on (HPCKV_ATTEMPTS)" in second.stderr


def test_one_task_of_an_array_goes_on_alone(tmp_path):
    one = batch(tmp_path, **{"continue": "chain"})
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    assert one.start("answer; exit 75", job=8, **array).returncode == 0
    assert "--array=3" in one.called("sbatch")
    assert os.readlink(tmp_path / "submit" / "5_3_submitted.pkl") == "5_submitted.pkl"
    assert os.readlink(tmp_path / "submit" / "77_submitted.pkl") == "5_submitted.pkl"
    assert starts(one) == ["3.00001.8"]


def test_none_ends_with_75(tmp_path):
    one = batch(tmp_path, **{"continue": "none"})
    done = one.start("answer; exit 75")
    assert (done.returncode, one.called("sbatch"), one.called("scontrol")) == (75, [], [])
    assert "sbatch the same script again to go on" in done.stderr


def test_a_finished_run_s_successor_starts_nothing(tmp_path):
    one = batch(tmp_path, **{"continue": "requeue"})
    assert one.start("answer; exit 0").returncode == 0
    again = one.start("exit 1", job=2)
    assert (again.returncode, again.stderr) == (0, "hpckv: the run is finished; nothing to do\n")
    assert one.called("srun").count("submitit") == 1


def test_two_starts_without_a_new_answer_stop_it_and_one_with_does_not(tmp_path):
    one = batch(tmp_path, **{"continue": "chain"})
    steps = ["answer; exit 75", "exit 75", "answer; exit 75", "exit 75", "exit 75"]
    done = [one.start(step, job=number) for number, step in enumerate(steps, start=1)]
    assert [each.returncode for each in done] == [0, 0, 0, 0, 75]
    assert "two starts in a row gave no new answer; not going on" in done[-1].stderr


def test_a_run_whose_directory_only_itself_knows_is_stopped_too(tmp_path):
    one = batch(tmp_path, is_submitted=False, **{"continue": "chain"})
    begins = 'echo "$(cat "$RUN/output.jsonl" 2>/dev/null | wc -l) $RUN" >"$HPCKV_BEGINNING"'
    steps = ["answer; exit 75", "exit 75", "answer; exit 75", "exit 75", "exit 75"]
    done = [
        one.start(f"{begins}; {step}", job=number, HPCKV_FIRST_JOB="1", HPCKV_ATTEMPT=str(number))
        for number, step in enumerate(steps, start=1)
    ]
    assert [each.returncode for each in done] == [0, 0, 0, 0, 75]
    assert "two starts in a row gave no new answer; not going on" in done[-1].stderr
    (folder,) = (tmp_path / "run" / "logs").iterdir()
    assert folder.name == "starts-of-1"
    assert (folder / "0.00004.4").read_text().split()[-1] == "chain"
    assert "HPCKV_BEGINNING" not in "".join(one.called("sbatch.env"))
    assert not list(tmp_path.glob("tmp.*"))


def test_a_directory_that_is_called_otherwise_in_an_image_is_not_made(tmp_path):
    one = batch(tmp_path, is_submitted=False, **{"continue": "chain"})
    done = one.start(f'echo "0 {tmp_path}/inside" >"$HPCKV_BEGINNING"; exit 75')
    assert (done.returncode, (tmp_path / "inside").exists()) == (0, False), done.stderr


OTHERS = ["store_gc", "acct_rollup", "doctor", "stage_model", "bench_load_or_recompute", "warm_prefix"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_run_has_nothing_of_a_runs_settings(tmp_path, name):
    one = batch(tmp_path)
    (tmp_path / "calls" / "step").write_text("exit 0")
    (tmp_path / "run" / "logs").rmdir()
    site = {"HPCKV_RUN_DIR": f"{tmp_path}/run", "HPCKV_MAX_POINTS": "1", "HPCKV_MAX_ELAPSED": "0:01"}
    for environ in (site, {"HPCKV_MAX_ELAPSED": "0:01"}):
        done = subprocess.run(
            ["bash", str(TOP / "slurm" / f"{name}.sh"), "DIR"],
            env={**one.environ(1), **environ, "HPCKV_SIF": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert one.called("srun").count("--export=ALL") == (4 if name == "store_gc" else 2)
    assert list((tmp_path / "run").iterdir()) == []


def test_answers_that_are_not_merged_yet_are_progress(tmp_path):
    one = batch(tmp_path, **{"continue": "chain"})
    parts = tmp_path / "run" / "queue" / "1" / "parts"
    parts.mkdir(parents=True)
    for number in (1, 2, 3):
        assert one.start(f"echo '{{}}' >>'{parts}/a.{number}.jsonl'; exit 75", job=number).returncode == 0


def test_attempts_are_counted_whatever_the_environment_says(tmp_path):
    one = batch(tmp_path, **{"continue": "chain", "attempts": "3"})
    done = [one.start("answer; exit 75", job=number) for number in (1, 2, 3)]
    assert [each.returncode for each in done] == [0, 0, 75]
    assert "requests are left after 3 starts; not going on (HPCKV_ATTEMPTS)" in done[-1].stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"continue": "often"}, "HPCKV_CONTINUE=often is none of requeue, chain, none"),
        ({"attempts": "many"}, "HPCKV_ATTEMPTS=many is not a number"),
        ({"max_elapsed": "soon"}, "HPCKV_MAX_ELAPSED=soon is no time as Slurm writes it"),
        ({"max_points": "3"}, "HPCKV_MAX_POINTS needs HPCKV_POINTS_PER_NODE_HOUR"),
        ({"max_points": "3", "points_per_node_hour": "0.0"}, "HPCKV_POINTS_PER_NODE_HOUR=0.0 is not a number above 0"),
    ],
)
def test_a_wrong_setting_is_said_before_anything_is_begun(tmp_path, settings, said):
    one = batch(tmp_path, **settings)
    done = one.start("exit 0")
    assert done.returncode == 64
    assert said in done.stderr
    assert one.called("srun") == []


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_reaches_the_step_and_its_work_is_waited_for(tmp_path, name):
    one = batch(tmp_path, **{"continue": "chain"})
    script, ready = tmp_path / "script.sh", tmp_path / "ready"
    one.start("exit 0")
    step = f"trap 'answer; exit 75' {name}; touch {ready}; while :; do sleep 0.05; done"
    (tmp_path / "calls" / "step").write_text(f"answer() {{ echo '{{}}' >>\"$RUN/output.jsonl\"; }}\n{step}\n")
    for path in (tmp_path / "submit" / "starts").iterdir():
        path.unlink()
    process = subprocess.Popen(["bash", str(script)], env=one.environ(1), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(getattr(signal, f"SIG{name}"))
    said = process.communicate(timeout=60)[1]
    assert (tmp_path / "run" / "output.jsonl").read_text() == "{}\n"
    if name == "USR1":
        assert (process.returncode, one.called("sbatch")[0]) == (0, "--parsable"), said
        assert last_word(one) == "75 chain"
    else:  # cancelled jobs stay cancelled
        assert (process.returncode, one.called("sbatch")) == (75, []), said
        assert "ended from outside" in said
        assert last_word(one) == "75 ended"  # whether it starts again is for Slurm to say


def test_a_signal_before_the_run_listens_is_no_failure(tmp_path):
    one = batch(tmp_path, **{"continue": "none"})
    # The step dies of it, as Python does before it has blocked its signals.
    done = one.start("kill -USR1 $PPID; for n in {1..600}; do sleep 0.1; done")
    assert done.returncode == 75, done.stderr


def test_a_lost_ranks_exit_code_is_believed_more_than_srun(tmp_path):
    one = batch(tmp_path, **{"continue": "chain"})
    done = one.start('answer; echo 75 >"$HPCKV_OUTCOME"; exit 137')
    assert done.returncode == 0
    assert "goes on" in done.stderr
