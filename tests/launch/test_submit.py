"""Submitting without a Slurm: what is refused, what is rendered, what lies in the submit folder, what sbatch sees."""

import json
import os
import pickle
import pickletools
import stat
import subprocess
import sys

import pytest

from hpckv.errors import HpckvError
from hpckv.launch.environment import scrubbed
from hpckv.launch.submit import SubmitOptions, load_submit, prepare, submit
from hpckv.launch.worker import worker_environment
from hpckv.schema import read_yaml
from hpckv.workload.runfile import ContainerConfig, SlurmConfig
from tests.cli.runs import write_run
from tests.launch.scripts import CASES, GOLDEN, LINE, TOP, render

MODEL = TOP / "examples" / "recall-1m"


def made(tmp_path, *, flags=None, sets=(), sbatch=(), environ=None, executor=None, run_flags=(), **sections):
    run_file = write_run(tmp_path, MODEL, LINE, **sections)
    config = load_submit(run_file, flags=flags or {}, sets=sets, sbatch=sbatch, environ=environ or {})
    return prepare(config, SubmitOptions(executor, run_flags), tmp_path, needs_slurm=False)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A program that takes every job, and writes down what it was told."""
    folder = tmp_path / "sbatch"
    folder.mkdir()
    (folder / "sbatch").write_text(
        f"#!/bin/bash\nprintf '%s\\n' \"$@\" >{folder}/arguments; env >{folder}/env; echo Submitted batch job 42\n"
    )
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def variables(sbatch):
    return dict(line.partition("=")[::2] for line in (sbatch / "env").read_text().splitlines())


@pytest.mark.parametrize("case", CASES)
def test_a_rendered_script_is_as_it_was(tmp_path, case):
    text = render(tmp_path, case)
    assert text == (GOLDEN / f"{case}.sh").read_text(), "if that is what you want: python -m tests.launch.scripts"
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert not list(tmp_path.glob("*/run*/"))


@pytest.mark.parametrize("field", sorted(set(SlurmConfig.__struct_fields__) - {"ntasks", "error", "omit"}))
def test_every_field_of_slurm_has_an_effect(tmp_path, field):
    values = {
        **dict.fromkeys(("nodes", "cpus_per_task", "gpus_per_node", "attempts", "signal_s", "array"), 2),
        **dict.fromkeys(("mem", "tmp"), "1G"),
        **{name: ["--a-word"] for name in ("setup", "sbatch", "srun")},
        **dict.fromkeys(("max_points", "points_per_node_hour"), 2.5),
        "time": "1:00:00",
        "continuation": "chain",
        "max_elapsed": "1-0",
    }
    others = {"points_per_node_hour": 1.0} if field == "max_points" else {}
    section = {"slurm": {**others, field: values.get(field, "a-word")}, "parallel": {"tp": 2}}
    changed = made(tmp_path, **section).text.splitlines()
    before = made(tmp_path, slurm=others, parallel={"tp": 2}).text.splitlines()
    new = [line for line in changed if line not in before and "submit/20" not in line]
    assert len(new) in (1, 2), new  # --array has another log, too


def test_what_a_sites_sbatch_refuses_is_left_out(tmp_path):
    omit = ["ntasks", "ntasks-per-node", "nodes", "signal", "open-mode", "requeue"]
    headers = {
        line.partition("=")[0].split("--")[1]
        for line in made(tmp_path, slurm={"omit": omit, "sbatch": ["--rsc", "p=1"]}).text.splitlines()
        if line.startswith("#SBATCH --")
    }
    assert headers == {"job-name", "output", "rsc p"}


@pytest.mark.parametrize("field", ContainerConfig.__struct_fields__)
def test_every_field_of_container_has_an_effect(tmp_path, field):
    (tmp_path / "image").touch()
    section = {"image": "image", "runtime": "singularity", "bind": ["/a-word"], "python": "/a-word"}
    both = [made(tmp_path, container={"image": "image", **more}).text for more in ({}, {field: section[field]})]
    new = set(both[1].splitlines()) - set(both[0].splitlines())
    if field == "image":
        assert f"HPCKV_SIF={tmp_path}/image" in both[0]
    else:
        assert any(str(section[field]).strip("[]'") in line for line in new), new


def test_flag_beats_environment_beats_run_file_beats_site_beats_default(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text(
        'defaults: {slurm: {account: site, partition: site, qos: site, time: "1", points_per_node_hour: 1.5}}\n'
    )
    config = made(
        tmp_path,
        site=str(site),
        slurm={"partition": "file", "qos": "file", "attempts": 2, "continuation": "none"},
        environ={"HPCKV_ATTEMPTS": "3", "HPCKV_CONTINUE": "chain", "HPCKV_MAX_POINTS": "7", "HPCKV_BIND": "/a,/b"},
        flags={"slurm.qos": "flag", "slurm.continuation": "requeue", "slurm.time": None},
        sets=["slurm.max_points=9"],
    ).script.config
    slurm = config.slurm
    assert (slurm.account, slurm.partition, slurm.qos, slurm.time) == ("site", "file", "flag", "1")
    assert (slurm.attempts, slurm.continuation, slurm.max_points) == (3, "requeue", 9)
    assert (slurm.points_per_node_hour, slurm.nodes) == (1.5, 1)
    assert config.container.bind == ["/a", "/b"]


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"slurm": {"partion": "x"}}, 64, "slurm.partion: unknown key; did you mean 'partition'?"),
        ({"slurm": {"nodes": "two"}}, 64, "slurm.nodes: Expected `int`, got `str`"),
        ({"slurm": {"nodes": 2}}, 64, "slurm.nodes: 2, but parallel: has 1 ranks"),
        ({"slurm": {"ntasks": 3}, "parallel": {"tp": 2}}, 64, "slurm.ntasks: 3, but parallel: has 2 ranks"),
        ({"slurm": {"time": 43200}}, 64, "slurm.time: 43200 is a number; write the time in quotes"),
        ({"slurm": {"time": "noon"}}, 64, "slurm.time: 'noon' is no time as Slurm writes it"),
        ({"slurm": {"mem": "lots"}}, 64, "slurm.mem: 'lots' is no size as Slurm writes it"),
        ({"slurm": {"array": "1..3"}}, 64, "slurm.array: 1..3: expected numbers"),
        (
            {"slurm": {"time": "2", "signal_s": 120}},
            64,
            "slurm.signal_s: 120 s before the end of 2 is before its start",
        ),
        ({"slurm": {"omit": ["ntask"]}}, 64, "slurm.omit: ntask is not asked for; did you mean 'ntasks'?"),
        ({"slurm": {"max_points": 3}}, 64, "slurm.max_points: needs slurm.points_per_node_hour"),
        ({"slurm": {"continuation": "often"}}, 64, "slurm.continuation: Invalid enum value 'often'"),
        ({"slurm": {"account": "a\n#SBATCH --x"}}, 64, "slurm.account: a line's end in it cannot be told to Slurm"),
        ({"container": {"runtime": "docker"}}, 64, "container.runtime: Invalid enum value 'docker'"),
        ({"container": {"bind": ["data"]}}, 64, "container.bind: data: expected /SOURCE"),
        ({"container": {"image": "no.sif"}}, 66, "container.image: no.sif: no such image"),
        ({"input": "nothing.jsonl"}, 66, "nothing.jsonl: No such file"),
        ({"output": "run-%j"}, 64, "stands for a job's number"),
        ({"sbatch": ["gpu"]}, 64, "gpu: not expected; options of sbatch stand after --"),
        ({"sbatch": ["--wait"]}, 64, "--wait: hpckv submit has --dry-run, --parsable and --wait of its own"),
        ({"environ": {"HPCKV_ATTEMPTS": "x"}}, 64, "HPCKV_ATTEMPTS=x: not a number"),
        ({"environ": {"HPCKV_CONTINUE": "x"}}, 64, "slurm.continuation: Invalid enum value 'x'"),
        ({"executor": "local", "slurm": {"nodes": 2}, "parallel": {"tp": 2}}, 64, "--executor local has this one"),
        ({"executor": "local", "slurm": {"array": "0-1"}}, 64, "slurm.array: only Slurm has that"),
        ({"executor": "debug", "parallel": {"tp": 2}}, 64, "--executor debug is one process"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_written(tmp_path, given, code, said):
    with pytest.raises(HpckvError) as caught:
        made(tmp_path, **given)
    assert caught.value.exit_code == code
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_nobody_else_opens_and_a_pickle_that_is_only_a_path(tmp_path, sbatch):
    prepared = made(tmp_path, flags={"sampling.max_tokens": 5}, run_flags=["--allow-errors"], slurm={"array": "0-1"})
    assert submit(prepared, {**os.environ, "HPCKV_STORE": "/elsewhere"}).job == "42"
    folder = prepared.script.folder
    assert folder.parent == tmp_path / "out" / "submit"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "42_submission.sh").read_text() == prepared.text
    assert (folder / "jobs").read_text() == "42\n"

    raw = (folder / "42_submitted.pkl").read_bytes()
    texts = {argument for _, argument, _ in pickletools.genops(raw) if isinstance(argument, str)}
    delayed = pickle.loads(raw)
    assert (delayed.args, delayed.kwargs) == ((str(folder / "config.yaml"),), {})
    assert f"{delayed.function.__module__}.{delayed.function.__name__}" == "hpckv.launch.worker.work"
    names = {"submitit.core.utils", "DelayedSubmission", "hpckv.launch.worker", "work", "function", "args", "kwargs"}
    own = {"_result", "_done", "_timeout_min", "_timeout_countdown"}
    assert texts == names | own | {str(folder / "config.yaml")}

    resolved = read_yaml(folder / "config.yaml")
    assert (resolved["sampling"]["max_tokens"], resolved["slurm"]["array"]) == (5, "0-1")
    assert json.loads((folder / "flags.json").read_text()) == ["--allow-errors", "--join"]  # an array's jobs join


def test_sbatch_is_told_nothing_of_the_job_it_is_called_from(tmp_path, sbatch):
    inside = {"SLURM_JOB_ID": "1", "SLURM_CPU_BIND": "x", "SLURM_CONF": "/c", "SBATCH_QOS": "x", "SRUN_DEBUG": "1"}
    ranks = {"PMI_RANK": "0", "PMIX_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "RANK": "0", "HPCKV_OUTCOME": "x"}
    submit(made(tmp_path), {**os.environ, **inside, **ranks, "MINE": "1"})
    seen = variables(sbatch)
    assert {name: seen[name] for name in ("SLURM_CONF", "MINE")} == {"SLURM_CONF": "/c", "MINE": "1"}
    assert not seen.keys() & ({*inside, *ranks} - {"SLURM_CONF"})
    assert "RANK" not in os.environ  # and this process is as it was
    assert "MINE" not in os.environ


def test_outside_a_job_a_users_defaults_for_sbatch_hold_where_nothing_else_is_said():
    mine = {
        "SBATCH_ACCOUNT": "a",
        "SBATCH_PARTITION": "p",
        "SBATCH_TIMELIMIT": "9",
        "SBATCH_NO_REQUEUE": "1",
        "SLURM_CONF": "/c",
    }
    assert scrubbed(mine, ["partition", "time", "requeue"]) == {"SBATCH_ACCOUNT": "a", "SLURM_CONF": "/c"}


def test_in_the_job_variables_have_no_more_weight_than_what_was_resolved():
    environ = {
        "HPCKV_STORE": "/x",
        "HPCKV_RUN_DIR": "/x",
        "HPCKV_SITE": "/x",
        "HPCKV_SIF": "/x",
        "HPCKV_LOCAL": "/x",
        "A": "1",
    }
    assert worker_environment({"store": {"local": "none"}}, environ) == {"A": "1"}
    assert worker_environment({"store": {"local": "auto"}}, environ) == {"A": "1", "HPCKV_LOCAL": "/x"}
    ranks = {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1", "HPCKV_PORT": "5"}
    told = worker_environment({}, ranks)
    assert (told["RANK"], told["WORLD_SIZE"], told["MASTER_PORT"]) == ("1", "2", "5")


def test_a_refusal_of_sbatch_is_said_and_leaves_no_folder(tmp_path, sbatch):
    (sbatch / "sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: error: first' >&2; echo 'sbatch: error: no such thing' >&2; exit 1\n"
    )
    with pytest.raises(HpckvError, match=r"^sbatch: error: no such thing$") as caught:
        submit(made(tmp_path))
    assert caught.value.exit_code == 69
    assert list((tmp_path / "out" / "submit").iterdir()) == []


def test_a_container_sees_where_a_models_files_really_lie(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "cache" / "blob").write_bytes((MODEL / "config.json").read_bytes())
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "cache" / "blob")
    (tmp_path / "image").touch()
    sections = {
        "container": {"image": "image"},
        "store": {"shared": str(tmp_path / "kv" / "new"), "local": "/local/ssd"},
    }
    prepared = made(tmp_path, **sections, sets=["model.path=model"])
    assert set(prepared.script.paths) == {
        str(tmp_path),
        *(str(tmp_path / name) for name in ("model", "cache")),
        "/local/ssd",
    }


def test_no_torch_is_imported():
    code = (
        "import sys; sys.modules['torch'] = None; import hpckv.launch.submit, hpckv.launch.executors, hpckv.launch.wait"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
