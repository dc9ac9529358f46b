"""What images are built from: lock files that are whole, a builder that says what is wrong in one line, pip's settings."""

import configparser
import re
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
CONTAINERS = TOP / "containers"
BUILD = CONTAINERS / "build.sh"

CUDA = ["cublas", "cuda-cupti", "cuda-nvrtc", "cuda-runtime", "cufft", "cufile", "curand", "cusolver", "cusparse"]
CUDA += ["nvjitlink", "nvtx"]
BESIDE = ["cudnn", "cusparselt", "nccl", "nvshmem"]


def normal(name: str) -> str:
    """PEP 503: how names of packages are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(name: str) -> dict[str, str]:
    """The lock file of an image: package -> version. Every line pins one package, in order."""
    lines = (CONTAINERS / "lock" / f"{name}.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9_.+]*", line)] == []
    assert lines == sorted(lines, key=str.lower)
    pairs = [line.split("==") for line in lines]
    assert len({normal(package) for package, _ in pairs}) == len(pairs)
    return {normal(package): version for package, version in pairs}


@pytest.mark.parametrize(
    ("name", "torch", "libraries"),
    [
        ("cpu", "2.13.0+cpu", []),
        ("cu126", "2.13.0+cu126", [f"nvidia-{part}-cu12" for part in CUDA + BESIDE]),
        ("cu13", "2.13.0", [f"nvidia-{part}" for part in CUDA] + [f"nvidia-{part}-cu13" for part in BESIDE]),
    ],
)
def test_locks_differ_in_torch_and_its_libraries_only(name, torch, libraries):
    lock, cpu = locked(name), locked("cpu")
    cuda = {*libraries, "cuda-bindings", "cuda-pathfinder", "cuda-toolkit", "triton"} if libraries else set()
    assert lock.keys() - cpu.keys() == cuda
    assert cpu.keys() - lock.keys() == set()
    assert {package for package in cpu if cpu[package] != lock[package]} == (set() if name == "cpu" else {"torch"})
    assert lock["torch"] == torch


def test_locks_hold_what_the_package_needs_in_the_versions_it_is_tested_with():
    lock = locked("cpu")
    setup = configparser.ConfigParser()
    setup.read(TOP / "setup.cfg")
    needed = [normal(re.split("[<>=]", line)[0]) for line in setup["options"]["install_requires"].split()]
    assert len(needed) >= 14
    assert [package for package in [*needed, "mpich", "setuptools"] if package not in lock] == []
    constraints = dict(line.split("==") for line in (TOP / "constraints.txt").read_text().split())
    tested = {normal(package): version for package, version in constraints.items() if normal(package) in lock}
    assert {package: lock[package].partition("+")[0] for package in tested} == tested


def test_definitions_differ_in_name_lock_index_and_architectures_only():
    cpu = (CONTAINERS / "hpckv-cpu.def").read_text()
    for name, lock, flags in (("cu126-v100", "cu126", "sm_70 sm_80 sm_90"), ("cu13-a100-h100", "cu13", "sm_80 sm_90")):
        text = (CONTAINERS / f"hpckv-{name}.def").read_text()
        index = {"cu126": "https://download.pytorch.org/whl/cu126", "cu13": "none"}[lock]
        as_cpu = text.replace(f"hpckv-{name}", "hpckv-cpu").replace(f"build.sh {name}", "build.sh cpu")
        as_cpu = as_cpu.replace(f"lock/{lock}.txt", "lock/cpu.txt").replace(f" --architectures {flags}", "")
        as_cpu = as_cpu.replace(f"torch_index={index}\n", "torch_index=https://download.pytorch.org/whl/cpu\n")
        assert as_cpu.splitlines()[1:] == cpu.splitlines()[1:]


def build(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([BUILD, *map(str, arguments)], capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 64, "which image: cpu, cu126-v100 or cu13-a100-h100?"),
        (["cuda"], 64, "no image cuda: cpu, cu126-v100 or cu13-a100-h100"),
        (["cpu", "cu126-v100"], 64, "one image at a time: cpu, or cu126-v100"),
        (["cpu", "--quick"], 64, "unknown flag --quick"),
        (["cpu", "--base"], 64, "--base needs a value"),
        (["cpu", "--mpi", "openmpi"], 64, "--mpi openmpi: hybrid or bind"),
        (["cpu", "--pip-conf", "none.conf"], 66, "none.conf: no such file"),
        (["cpu", "-o", "there.sif"], 73, "there.sif is there already (--force replaces it)"),
        (["cpu", "-o", "missing/new.sif"], 73, "missing: no folder to write to"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_built(tmp_path, arguments, code, said):
    (tmp_path / "there.sif").touch()
    done = build(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("hpckv: ")
    assert said in done.stderr


def test_without_a_container_runtime_it_says_which_are_looked_for(tmp_path):
    for program in ("bash", "cat", "dirname", "realpath"):
        (tmp_path / program).symlink_to(f"/usr/bin/{program}")
    done = build("cpu", cwd=tmp_path, env={"PATH": str(tmp_path)})
    assert done.returncode == 69
    assert done.stderr == "hpckv: neither apptainer nor singularity is here (module load apptainer?)\n"


def test_help_shows_every_flag_and_an_example():
    done = build("--help")
    assert done.returncode == 0
    known = {"--output", "--force", "--base", "--mpi", "--torch-index", "--pip-conf", "--gzip"}
    assert known <= set(re.findall(r"--[a-z-]+", done.stdout))
    assert "containers/build.sh cu126-v100 -o /project/me/hpckv.sif" in done.stdout


def test_scripts_are_clean_for_shellcheck():
    scripts = [BUILD, CONTAINERS / "pip_settings.sh", *(CONTAINERS / "image").glob("*.sh")]
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def collect(folder: Path, conf: str = "", **variables: str) -> tuple[str, list[str]]:
    """What a build is told of pip's settings (environ and every pip.conf), and what is bound for it."""
    line = f'. "{CONTAINERS}/pip_settings.sh"; binds=(); collect_pip_settings "$1" "$2"; printf "%s\\n" "${{binds[@]}}"'
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(folder / "home"), "XDG_CONFIG_DIRS": "/nonexistent", **variables}
    command = ["bash", "-eu", "-c", line, "collect", folder / "out", conf]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    files = sorted(path for path in (folder / "out").rglob("*") if path.is_file())
    told = "".join(f"[{path.relative_to(folder / 'out')}]\n{path.read_text()}" for path in files)
    return told, [part for part in done.stdout.splitlines() if part != "--bind"]


def test_pip_is_told_inside_what_it_is_told_here_and_local_folders_are_bound(tmp_path):
    for part in ("wheels", "wheels-new", "index/simple", "home/.config/pip"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "ca.pem").write_text("certificate\n")
    (tmp_path / "named.conf").write_text(f"[global]\nextra-index-url = file://{tmp_path}/index/simple\n")
    told, bound = collect(
        tmp_path,
        str(tmp_path / "named.conf"),
        PIP_FIND_LINKS=f"{tmp_path}/wheels {tmp_path}/wheels-new/",
        PIP_CERT=f"{tmp_path}/ca.pem",
        PIP_INDEX_URL="https://me:it's@packages.example/wheels",
        PIP_TARGET="/not/for/the/image",
    )
    assert told == (
        "[1]\ncertificate\n"
        "[environ]\n"
        "export XDG_CONFIG_DIRS=/mnt/site XDG_CONFIG_HOME=/mnt/user\n"
        "export PIP_CONFIG_FILE=/mnt/pip.conf\n"
        "export PIP_INDEX_URL='https://me:it'\\''s@packages.example/wheels'\n"
        "export PIP_FIND_LINKS='/mnt/2 /mnt/3'\n"
        "export PIP_CERT='/mnt/1'\n"
        "[pip.conf]\n[global]\nextra-index-url = file:///mnt/4/simple\n"
    )
    assert bound == [
        f"{tmp_path}/out:/mnt:ro",
        f"{tmp_path}/wheels:/mnt/2:ro",
        f"{tmp_path}/wheels-new:/mnt/3:ro",
        f"{tmp_path}/index:/mnt/4:ro",
    ]


def test_a_user_s_own_pip_configuration_is_found_where_pip_finds_it(tmp_path):
    conf = tmp_path / "home/.config/pip/pip.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text("[global]\nindex-url = https://packages.example/simple\n")
    told, _ = collect(tmp_path)
    assert "[user/pip/pip.conf]\n[global]\nindex-url = https://packages.example/simple\n" in told
