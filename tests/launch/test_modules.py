"""`module load hpckv`, by a real Lmod: both forms of the module file, and the command that they put into PATH."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import hpckv
from tests.launch.scripts import HOSTILE, TOP

LMOD = Path("/usr/share/lmod/lmod/init/bash")
FILES = sorted((TOP / "slurm" / "modulefiles" / "hpckv").iterdir())


@pytest.fixture
def lmod():
    if not LMOD.exists() and not os.environ.get("CI"):
        pytest.skip("sh tests/system_packages.sh installs what is missing: lmod")


@pytest.fixture(params=FILES, ids=["tcl", "lua"])
def checkout(request, tmp_path, lmod):
    """A copy with one form of the module file, an image, and what a site has written."""
    home = tmp_path / "checkout"  # Lmod itself cannot read Tcl files in folders with a space
    shutil.copytree(TOP / "slurm", home / "slurm")
    for file in (home / "slurm" / "modulefiles" / "hpckv").iterdir():
        if file.name != request.param.name:
            file.unlink()
    for name in ("hpckv.sif", "site.yaml", "site.sh"):
        (home / name).touch()
    return home


def module(home, *commands, **environ):
    """What bash says."""
    lines = [f". {LMOD}", 'module use "$1/slurm/modulefiles"', *commands]
    known = {"PATH": "/usr/bin:/bin", "HOME": str(home), "USER": "someone", **environ}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines), "bash", str(home)], env=known, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


SHOW = 'for name in HOME SIF SITE SITE_SH; do name=HPCKV_$name; echo "${!name:-}"; done; command -v hpckv'


def test_it_sets_what_the_checkout_has_and_takes_it_back(checkout):
    names = ["hpckv.sif", "site.yaml", "site.sh", "slurm/bin/hpckv"]
    assert module(checkout, "module load hpckv", SHOW) == [str(checkout), *(str(checkout / name) for name in names)]
    assert module(checkout, "module load hpckv", "module unload hpckv", SHOW + " || true") == [""] * 4


def test_a_users_own_image_stays(checkout):
    shown = module(
        checkout, "module load hpckv", SHOW, "module unload hpckv", 'echo "$HPCKV_SIF"', HPCKV_SIF="/mine.sif"
    )
    assert (shown[1], shown[-1]) == ("/mine.sif", "/mine.sif")


def test_what_is_not_there_is_not_set(checkout):
    for name in ("hpckv.sif", "site.yaml", "site.sh"):
        (checkout / name).unlink()
    assert module(checkout, "module load hpckv", SHOW)[1:4] == [""] * 3


def test_they_say_what_they_are(lmod):
    version = subprocess.run(
        ["bash", "-c", f". {LMOD}; module use {TOP}/slurm/modulefiles; module -t avail 2>&1; module whatis hpckv 2>&1"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert {path.name for path in FILES} == {hpckv.__version__, f"{hpckv.__version__}.lua"}
    assert f"hpckv/{hpckv.__version__}" in version
    assert "batch inference that never computes the same prefix twice" in version


def command(folder, **environ):
    """`hpckv --version` of that checkout, as PATH finds it."""
    known = {"PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder), **environ}
    line = ["bash", str(folder / "slurm" / "bin" / "hpckv"), "--version"]
    return subprocess.run(line, env=known, capture_output=True, text=True, check=False)


def test_the_command_is_the_environments_else_the_images_else_a_word(tmp_path):
    home = tmp_path / HOSTILE
    shutil.copytree(TOP / "slurm", home / "slurm")
    nothing = command(home)
    assert nothing.returncode == 69
    assert nothing.stderr.startswith("hpckv: neither ")
    for name, says in (("bin/apptainer", "image: $*"), (".venv/bin/hpckv", "environment: $*")):
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text(f'#!/bin/sh\necho "{says}"\n')
        (home / name).chmod(0o755)
        (home / "x.sif").touch()
        found = command(home, HPCKV_SIF=str(home / "x.sif"), HPCKV_RUNTIME="apptainer")
        assert found.returncode == 0, found.stderr
        assert found.stdout.startswith(says.split()[0])
        assert found.stdout.rstrip().endswith("--version")
