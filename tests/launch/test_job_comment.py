"""A job's comment in Slurm, with a program in `scontrol`'s place: what the run said of itself, and never in anybody's way."""

import pytest

from hpckv.engine.request import Answer, Usage
from hpckv.workload.job_comment import comment, leave_comment
from hpckv.workload.summary import Summary
from tests.launch.batch import Batch

SAYS = 'echo "hpckv hit=50.0% hits=8 computed=8 saved=00:00:01" >"$HPCKV_COMMENT"'
UPDATE = ["update", "JobId=1", "Comment=hpckv hit=50.0% hits=8 computed=8 saved=00:00:01"]


def batch(tmp_path, shown: str = "", **settings) -> Batch:
    """Whose `scontrol show job` says `shown`."""
    one = Batch(tmp_path, {f"HPCKV_{name.upper()}": value for name, value in settings.items()})
    show = f"[ \"$2\" != show ] || echo 'JobId=1 JobName=x {shown} Command=y'"
    does = 'printf "%s\\n" "$@" >>"$CALLS/scontrol"\n[ "$1" != requeue ] || kill "$(cat "$CALLS/script")"'
    one.program("scontrol", f"#!/bin/bash\n{show}\n{does}\n")
    return one


def calls(one: Batch) -> list[str]:
    show = ["--oneliner", "show", "job", "1"]
    said = one.called("scontrol")
    assert said[:4] in (show, [])
    return said[4:]


@pytest.mark.parametrize("code", [0, 3, 137])
def test_what_the_run_says_becomes_the_comment_whatever_its_end(tmp_path, code):
    one = batch(tmp_path)
    done = one.start(f"{SAYS}; exit {code}")
    assert (done.returncode, done.stderr, calls(one)) == (code, "", UPDATE)


def test_a_run_that_says_nothing_leaves_the_comment_as_it_is(tmp_path):
    one = batch(tmp_path)
    assert one.start("exit 66").returncode == 66
    assert one.called("scontrol") == []


def test_it_is_there_before_a_requeue(tmp_path):
    one = batch(tmp_path, **{"continue": "requeue"})
    one.start(f"answer; {SAYS}; exit 75")
    assert calls(one) == [*UPDATE, "requeue", "1"]


def test_a_later_start_replaces_its_own_and_nobody_else_s(tmp_path):
    again = batch(tmp_path / "again", "Comment=hpckv hit=1.0% hits=1 computed=99 saved=00:00:00")
    assert again.start(f"{SAYS}").returncode == 0
    assert calls(again) == UPDATE
    users = batch(tmp_path / "users", "Comment=billed to work package 7")
    assert users.start(f"{SAYS}").returncode == 0
    assert calls(users) == []
    admins = batch(tmp_path / "admins", "AdminComment=seen")
    assert admins.start(f"{SAYS}").returncode == 0
    assert calls(admins) == UPDATE


def test_a_task_of_an_array_names_itself_and_not_the_array(tmp_path):
    one = batch(tmp_path, **{"continue": "requeue"})
    one.start(f"answer; {SAYS}; exit 75", SLURM_ARRAY_JOB_ID="1", SLURM_ARRAY_TASK_ID="0")
    said = one.called("scontrol")
    assert said == ["--oneliner", "show", "job", "1_0", "update", "JobId=1_0", UPDATE[2], "requeue", "1_0"]


@pytest.mark.parametrize("does", ["exit 1", "sleep 60"])
def test_a_slurm_that_refuses_or_hangs_changes_nothing(tmp_path, does):
    one = batch(tmp_path)
    one.program("scontrol", f"#!/bin/bash\n{does}\n")
    done = one.start(f"{SAYS}; exit 0")
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_in_it_can_be_a_second_line_or_a_terminal_s_command(tmp_path):
    one = batch(tmp_path)
    one.start("printf 'hpckv a\\033[2J\\tb\\nJobId=2\\n' >\"$HPCKV_COMMENT\"")
    assert calls(one) == ["update", "JobId=1", "Comment=hpckv a[2Jb"]


def test_the_line_has_hits_and_saved_time_of_all_replicas(tmp_path, monkeypatch):
    summary = Summary(0)
    usage = Usage(prompt_tokens=40, completion_tokens=1, cached={"device": 10, "shared": 20})
    summary.add(Answer("a", [], usage))
    summary.replicas = [{"saved_gpu_s": 3600.0}, {"saved_gpu_s": 1.2}, {}]
    assert comment(summary) == "hpckv hit=75.0% hits=30 computed=10 saved=01:00:01"
    path = tmp_path / "comment"
    monkeypatch.setenv("HPCKV_COMMENT", str(path))
    leave_comment("nobody made the file: not on this node")
    assert not path.exists()
    path.touch()
    leave_comment(comment(summary))
    assert path.read_text() == "hpckv hit=75.0% hits=30 computed=10 saved=01:00:01\n"
