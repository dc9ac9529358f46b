"""Entering a container: what is bound, and what is not. Programs here say what they are told; tests/cluster has a real one."""

import csv
import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

RUNTIME = Path(__file__).parents[2] / "slurm" / "lib" / "runtime.sh"
TOLD = '#!/bin/bash\nprintf "%s\\0" "${0##*/}" "$@"\n'


@pytest.fixture
def node(tmp_path):
    """A node that has the programs in bin/, and an image."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "cut", "env"):  # and neither apptainer nor another
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "image.sif").touch()
    (tmp_path / "work").mkdir()
    return tmp_path


def has(node, *names):
    for name in names:
        (node / "bin" / name).write_text(TOLD)
        (node / "bin" / name).chmod(0o755)


def enter(node, *arguments, **environ):
    command = ["bash", str(RUNTIME), "--image", str(node / "image.sif"), *map(str, arguments)]
    variables = {"PATH": str(node / "bin"), "TMPDIR": str(node / "bin"), **environ}
    return subprocess.run(command, env=variables, cwd=node / "work", capture_output=True, text=True, check=False)


def told(done):
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def binds(words):
    return [after for word, after in pairwise(words) if word == "--bind"]


@pytest.mark.parametrize("name", ["apptainer", "singularity"])
def test_the_command_runs_in_the_image_with_its_folders_and_the_nodes(node, name):
    has(node, name)
    for folder in ("run", "run/inside", "local", "tmp", "pmix"):
        (node / folder).mkdir()
    words = told(
        enter(
            node,
            *("--path", node / "run", "--path", node / "run" / "inside", "--path", node / "absent", "--path", "/usr"),
            *("--bind", "/data:/data:ro,/opt", "--", "python3", "-u", "an argument"),
            HPCKV_LOCAL=f"{node}/local",
            SLURM_TMPDIR=f"{node}/tmp",
            PMIX_SERVER_TMPDIR=f"{node}/pmix",
        )
    )
    assert words[:3] == [name, "-q", "exec"]
    assert words[-6:] == ["--pwd", f"{node}/work", f"{node}/image.sif", "python3", "-u", "an argument"]
    found = binds(words)
    own = [path for path in found if path.startswith(str(node))]
    assert own == [f"{node}/{folder}" for folder in ("run", "local", "tmp", "bin", "pmix", "work")]
    assert found[-1] == "/data:/data:ro,/opt"
    assert "/usr" not in found
    assert ("/dev/shm" in found) == os.path.exists("/dev/shm")
    assert ("--nv" in words) == os.path.exists("/dev/nvidiactl")
    assert not {"--contain", "--containall", "--cleanenv"} & set(words)


def test_what_the_environment_names_is_seen_inside(node):
    has(node, "apptainer")
    for folder in ("site", "kv", "work/own"):
        (node / folder).mkdir()
    (node / "site" / "site.yaml").touch()

    def bound(**environ):
        found = binds(told(enter(node, "--", "true", **environ)))
        return [path for path in found if path.startswith(str(node)) and path not in (f"{node}/bin", f"{node}/work")]

    assert bound(HPCKV_SITE=f"{node}/site/site.yaml", HPCKV_STORE=f"{node}/kv") == [f"{node}/site", f"{node}/kv"]
    assert bound(HPCKV_STORE=f"{node}/kv/new/deep") == [f"{node}/kv"]  # where it will be made
    assert bound(HPCKV_SITE="site.yaml", HPCKV_STORE="own") == [f"{node}/work/own"]
    assert bound(HPCKV_SITE="/nowhere/site.yaml", HPCKV_STORE="/nowhere/kv") == []


def test_any_name_of_a_folder_reaches_the_container(node):
    has(node, "apptainer")
    folder = node / 'a,b: "c"\nd'
    folder.mkdir()
    words = told(enter(node, "--path", folder, "--", "true"))
    mount = words[words.index("--mount") + 1]
    assert next(csv.reader([mount])) == ["type=bind", f"source={folder}", f"destination={folder}"]


def test_charliecloud(node):
    has(node, "ch-run")
    (node / "run").mkdir()
    done = enter(
        node,
        "--runtime",
        "charliecloud",
        "--path",
        node / "run",
        "--bind",
        "/a:/b:ro",
        "--",
        "python3",
        "x",
        TMPDIR="/tmp",
    )
    words = told(done)
    assert words[0] == "ch-run"
    assert words[-6:] == ["--cd", f"{node}/work", f"{node}/image.sif", "--", "python3", "x"]
    if not str(node).startswith("/tmp/"):
        assert f"{node}/run:{node}/run" in binds(words)
    assert binds(words)[-1] == "/a:/b"


def test_the_first_that_is_there_is_taken_unless_one_is_named(node):
    has(node, "ch-run", "singularity", "apptainer")
    assert told(enter(node, "--", "true"))[0] == "apptainer"
    assert told(enter(node, "--runtime", "singularity", "--", "true"))[0] == "singularity"


def test_a_temporary_folder_that_this_node_has_not_is_not_used(node):
    has(node, "apptainer")
    (node / "bin" / "apptainer").write_text('#!/bin/bash\necho "${TMPDIR-unset} ${OTHER-unset}"\n')
    assert enter(node, "--", "true", TMPDIR="/no/such", OTHER="kept").stdout == "unset kept\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--check"], 69, "apptainer singularity ch-run is not here"),
        (["--runtime", "singularity", "--check"], 69, "singularity is not here (module load singularity?)"),
        (["--runtime", "docker", "--check"], 64, "HPCKV_RUNTIME=docker is none of"),
        (["--image", "/no/such.sif", "--check"], 66, "/no/such.sif: no such image"),
    ],
)
def test_what_is_missing_is_said_before_a_task_starts(node, arguments, code, said):
    done = enter(node, *arguments)
    assert done.returncode == code
    assert said in done.stderr


def test_check_starts_nothing(node):
    has(node, "apptainer")
    done = enter(node, "--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
