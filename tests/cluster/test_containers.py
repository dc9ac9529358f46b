"""The image of containers/hpckv-cpu.def, built and run by an ordinary user under a real Apptainer; what it says of itself is so."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.cluster.images import SECRET, TOP, Image, Person, build
from tests.cluster.test_container_files import locked, normal

pytestmark = [pytest.mark.root, pytest.mark.timeout(1800)]  # whichever comes first waits for the image

CONTAINERS = TOP / "containers"
HOST_MPI = "4.3.2"
"""An MPICH of another version than the image's: what a cluster has is never what an image has."""


def in_image(person: Person, sif: Path, *command: object, flags: tuple = (), **options) -> str:
    """What a command says inside."""
    done = person.run("apptainer", "--silent", "exec", *flags, sif, *command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def scratch(person: Person):
    """A folder of that user's outside their home, as /scratch is."""
    folder = Path(tempfile.mkdtemp(prefix="scratch-", dir=person.home.parent))
    shutil.chown(folder, person.name, person.name)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def host_mpi(person: Person) -> Path:
    """The folder of an MPI that belongs to the machine."""
    folder = person.home.parent / "mpi"
    install = ["pip", "install", "-qq", "--no-deps", "--ignore-installed", "--prefix", folder, f"mpich=={HOST_MPI}"]
    subprocess.run([sys.executable, "-m", *map(str, install)], check=True)
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def bind_sif(person: Person, checkout: Path, sif: Path) -> Path:
    """The image without an MPI of its own, built on the other one."""
    place = person.home.parent / "bind"
    place.mkdir()
    shutil.chown(place, person.name, person.name)
    done = build(person, checkout, "cpu", "--base", sif, "--mpi", "bind", "-o", place / "bind.sif")
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "bind.sif"


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def write_catalogue_run(folder: Path, checkout: Path, *, count: int) -> dict[str, str]:
    """A run over the first questions of the example, and the right answers."""
    lines = (TOP / "examples" / "catalogue.jsonl").read_text().splitlines()[:count]
    (folder / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
    run = {"model": {"path": str(checkout / "examples/recall-1m")}, "input": "in.jsonl", "output": "out"}
    (folder / "run.yaml").write_text(json.dumps(run))
    known = map(json.loads, (TOP / "examples" / "catalogue_answers.jsonl").read_text().splitlines())
    return {row["custom_id"]: row["answer"] for row in known if f'"{row["custom_id"]}"' in "".join(lines)}


def answers(folder: Path) -> dict[str, str]:
    rows = map(json.loads, (folder / "out" / "output.jsonl").read_text().splitlines())
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"].strip() for row in rows}


def test_an_ordinary_user_built_it_and_its_own_test_ran(image: Image):
    assert image.builder_uid >= 1000
    assert "Running testscript" in image.log
    torch = locked("cpu")["torch"]
    assert f"hpckv: as locked: hpckv 0.1.0, torch {torch} (none)" in image.log


def test_labels_say_commit_and_versions(person: Person, sif: Path, checkout: Path):
    done = person.run("apptainer", "inspect", "--json", "--labels", sif)
    labels = json.loads(done.stdout)["data"]["attributes"]["labels"]
    head = person.run("git", "rev-parse", "HEAD", cwd=checkout).stdout.strip()
    changed = person.run("git", "status", "--porcelain", "--untracked-files=no", cwd=checkout).stdout
    assert labels["hpckv.commit"] == head + ("-dirty" if changed else "")
    assert {
        name: labels[f"hpckv.{name}"] for name in ("image", "mpi", "version", "torch", "mpich", "architectures")
    } == {
        "image": "hpckv-cpu",
        "mpi": "hybrid",
        "version": "0.1.0",
        "torch": locked("cpu")["torch"],
        "mpich": locked("cpu")["mpich"],
        "architectures": "none",
    }
    said = in_image(person, sif, "getconf", "GNU_LIBC_VERSION")
    assert said == f"glibc {labels['hpckv.glibc']}\n"
    assert f"glibc {labels['hpckv.glibc']}" in (CONTAINERS / "README.md").read_text()


def test_what_is_installed_is_what_the_lock_file_says(person: Person, sif: Path):
    lines = in_image(person, sif, "python", "-m", "pip", "--disable-pip-version-check", "freeze", "--all").splitlines()
    have = {normal(line.split("==")[0]): line.split("==")[1] for line in lines if not line.startswith("hpckv @ ")}
    have.pop("pip")  # the base brings it
    assert have == locked("cpu")


def test_a_run_answers_right_and_writes_nothing_into_home(person: Person, sif: Path, checkout: Path, scratch: Path):
    right = write_catalogue_run(scratch, checkout, count=8)
    before = files_of(person.home)
    done = person.run("apptainer", "exec", sif, "hpckv", "run", "run.yaml", cwd=scratch)
    assert done.returncode == 0, done.stderr
    assert len(right) == 8
    assert answers(scratch) == right
    assert files_of(person.home) == before
    assert json.loads((scratch / "out" / "provenance.json").read_text())["container"] == str(sif)


def test_caches_go_to_a_folder_that_only_the_user_can_write_to(person: Person, sif: Path, scratch: Path):
    def triton_cache(**env: str) -> str:
        said = "import os; print(os.environ.get('TRITON_CACHE_DIR'))"
        return in_image(person, sif, "python", "-c", said, env=env).strip()

    cache = scratch / f"hpckv-cache-{person.uid}"
    assert triton_cache(TMPDIR=str(scratch)) == f"{cache}/triton"
    assert (cache.stat().st_uid, cache.stat().st_mode & 0o777) == (person.uid, 0o700)
    assert triton_cache(SLURM_TMPDIR=str(scratch), TMPDIR="/tmp") == f"{cache}/triton"
    assert triton_cache(SLURM_TMPDIR="/not/bound", TMPDIR=str(scratch)) == f"{cache}/triton"
    assert triton_cache(TMPDIR=str(scratch), TRITON_CACHE_DIR="/somewhere") == "/somewhere"
    cache.rmdir()
    cache.mkdir(mode=0o777)  # by root: anybody else who was there first
    assert triton_cache(TMPDIR=str(scratch)) == f"/tmp/hpckv-cache-{person.uid}/triton"
    shutil.rmtree(f"/tmp/hpckv-cache-{person.uid}")


def test_everybody_can_read_it_and_it_says_nothing_of_where_pip_looked(person: Person, sif: Path):
    assert in_image(person, sif, "find", "/opt/hpckv", "-not", "-perm", "-004") == ""
    inside = (
        "grep -rlF -e {} /opt/hpckv/image /opt/hpckv/pyvenv.cfg /.singularity.d /etc 2>/dev/null; ls -A /mnt".format
    )
    assert in_image(person, sif, "sh", "-c", inside(SECRET)) == ""


@pytest.mark.mpi
@pytest.mark.parametrize(
    "outside", [False, True], ids=["the image's mpiexec, ranks in one container", "the host's, a container each"]
)
def test_ranks_meet_by_the_image_s_own_mpi(
    person: Person, sif: Path, checkout: Path, host_mpi: Path, scratch: Path, outside
):
    right = write_catalogue_run(scratch, checkout, count=4)
    run = ["hpckv", "run", "run.yaml", "--set", "parallel.tp=2"]
    started = [host_mpi / "bin/mpiexec", "-n", "2", "apptainer", "exec", sif, *run]
    if not outside:
        started = ["apptainer", "exec", sif, "mpiexec", "-n", "2", *run]
    done = person.run(*started, cwd=scratch, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "UCX" not in done.stderr  # a message that it found another way costs a user an evening
    assert answers(scratch) == right
    assert len(json.loads((scratch / "out" / "provenance.json").read_text())["hosts_of_ranks"]) == 2


LARGE_MESSAGE = """
from mpi4py import MPI
import numpy as np
ones, total = np.ones(4_000_000, "f4"), np.empty(4_000_000, "f4")
MPI.COMM_WORLD.Allreduce(ones, total)
loaded = next(line.split()[-1] for line in open("/proc/self/maps") if "libmpi.so" in line)
if MPI.COMM_WORLD.rank == 0:
    print(total.min(), total.max(), MPI.Get_library_version().split()[2], loaded)
"""


@pytest.mark.mpi
def test_large_messages_pass_between_containers_of_one_node(person: Person, sif: Path, host_mpi: Path):
    """Where each has a user namespace of its own the kernel forbids the short way, and MPICH ends the run unless told."""
    step = [host_mpi / "bin/mpiexec", "-n", "2", "apptainer", "--silent", "exec", sif, "python", "-c", LARGE_MESSAGE]
    done = person.run(*step)
    assert done.stdout == f"2.0 2.0 {locked('cpu')['mpich']} /opt/hpckv/lib/libmpi.so.12\n", done.stderr
    assert done.stderr == ""


@pytest.mark.mpi
def test_the_bind_variant_runs_with_the_host_s_mpi_and_has_none_itself(person: Person, bind_sif: Path, host_mpi: Path):
    labels = json.loads(person.run("apptainer", "inspect", "--json", "--labels", bind_sif).stdout)
    labels = labels["data"]["attributes"]["labels"]
    assert (labels["hpckv.mpi"], labels["hpckv.mpich"]) == ("bind", "none")
    mpi = ["--bind", f"{host_mpi}:/host/mpi", "--env", "LD_LIBRARY_PATH=/host/mpi/lib"]
    step = ["apptainer", "--silent", "exec", *mpi, bind_sif, "python", "-c", LARGE_MESSAGE]
    done = person.run(host_mpi / "bin/mpiexec", "-n", "2", *step)
    assert done.stdout == f"2.0 2.0 {HOST_MPI} /host/mpi/lib/libmpi.so.12\n", done.stderr
    alone = person.run("apptainer", "--silent", "exec", bind_sif, "python", "-c", "from mpi4py import MPI")
    assert "cannot load MPI library" in alone.stderr


@pytest.mark.mpi
def test_charliecloud_runs_what_is_in_the_image(
    person: Person, sif: Path, checkout: Path, host_mpi: Path, scratch: Path
):
    """The file's own squashfs, as docs/containers.md says it; a folder bound in has to be there in the image."""
    squash = scratch / "hpckv.sqfs"
    parts = person.run("apptainer", "sif", "list", sif).stdout
    number = next(line.split()[0] for line in parts.splitlines() if "FS (Squashfs" in line)
    assert person.run("sh", "-c", f"apptainer sif dump {number} '{sif}' >'{squash}'").returncode == 0
    right = write_catalogue_run(scratch, checkout, count=2)
    shutil.copytree(TOP / "examples" / "recall-1m", scratch / "recall-1m")
    subprocess.run(["chmod", "-R", "a+rX", scratch / "recall-1m"], check=True)
    run = ["hpckv", "run", "run.yaml", "--set", "model.path=recall-1m"]
    done = person.run("ch-run", "--bind", f"{scratch}:/mnt", "--cd", "/mnt", squash, "--", *run)
    assert done.returncode == 0, done.stderr
    assert answers(scratch) == right
    ranks = ["ch-run", squash, "--", "/opt/hpckv/bin/python", "-c", LARGE_MESSAGE]
    done = person.run(host_mpi / "bin/mpiexec", "-n", "2", *ranks)
    assert done.stdout == f"2.0 2.0 {locked('cpu')['mpich']} /opt/hpckv/lib/libmpi.so.12\n", done.stderr
    folder = scratch / "folder"
    assert person.run("ch-convert", "-i", "squash", "-o", "dir", squash, folder).returncode == 0
    assert person.run("ch-run", folder, "--", "hpckv", "--version").stdout == "hpckv 0.1.0\n"


@pytest.mark.parametrize(
    ("name", "architectures"), [("cu126-v100", "sm_70 sm_80 sm_90"), ("cu13-a100-h100", "sm_80 sm_90")]
)
def test_a_cuda_image_refuses_a_torch_without_code_for_its_gpus(
    person: Person, sif: Path, checkout: Path, rootfs: Path, scratch: Path, name, architectures
):
    """Its definition as Apptainer understands it, and its own test over a torch whose list we wrote."""
    sandbox, definition = scratch / "sandbox", checkout / "containers" / f"hpckv-{name}.def"
    short = scratch / "short.def"  # all but what needs gigabytes from a registry
    short.write_text(re.sub(r"%files.*?(?=%labels)", "", definition.read_text(), flags=re.DOTALL))
    header = ["--build-arg", "bootstrap=localimage", "--build-arg", f"base={rootfs}", "--build-arg", "commit=c0ffee"]
    done = person.run(
        *["apptainer", "build", "--fakeroot", "--sandbox", "--notest", *header, "--build-arg", "mpi=hybrid"],
        *[sandbox, short],
        cwd=checkout,
    )
    assert done.returncode == 0, done.stderr
    rendered = person.run("apptainer", "inspect", "--deffile", sandbox).stdout
    assert "{{" not in rendered
    assert "hpckv.commit c0ffee" in rendered
    test = person.run("apptainer", "inspect", "--test", sandbox).stdout
    command = next(line.split() for line in test.splitlines() if "check.py" in line)
    assert command[-len(architectures.split()) - 1 :] == ["--architectures", *architectures.split()]

    def check(flags: str) -> tuple[int, str]:
        (scratch / "torch.py").write_text(f"class cuda:\n    get_arch_list = staticmethod({flags.split()!r}.copy)\n")
        flag = ("--env", f"PYTHONPATH={scratch}")
        done = person.run("apptainer", "--silent", "exec", *flag, sif, *command)
        return done.returncode, done.stderr

    assert check(f"sm_50 {architectures} compute_90") == (0, "")
    missing = architectures.removesuffix(" sm_90")
    assert check("sm_75 sm_90 sm_100") == (1, f"hpckv: torch has no code for {missing}: it has sm_75 sm_90 sm_100\n")
    assert check("") == (1, f"hpckv: torch has no code for {architectures}: it has none\n")
    shutil.rmtree(sandbox)
