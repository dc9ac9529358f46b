"""An image really built by `containers/build.sh`, by an ordinary user, and that user: for tests.

A build takes a minute or two, so the image and the root filesystem it is built on stay on this machine for the next test run,
under a name that says everything that went into them. With CI set nothing is taken from an earlier run.
"""

import ast
import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.apptainer import apptainer as install_apptainer

TOP = Path(__file__).parents[2]
_FOLDERS, _PREFIX = Path("/var/tmp"), "hpckv-images-"
_KEPT = _FOLDERS / "hpckv-kept-images"
_KEPT_S = 2 * 24 * 3600
_SUITE, _PACKAGES = "bookworm", "python3-venv,libstdc++6,ca-certificates"
_SHM, _BUILD_BYTES = Path("/dev/shm"), 6 << 30
SECRET = "a-password-in-the-settings-of-pip.invalid"
"""Stands in what pip is told while the image is built, and must not be in the image."""


@dataclass(frozen=True)
class Person:
    """An ordinary user of this machine, with an empty home."""

    name: str
    uid: int
    home: Path

    def run(self, *command: object, env: Mapping[str, str] | None = None, **options) -> subprocess.CompletedProcess:
        """A command as that user, who keeps files to themselves, in their home, with nothing of our environment."""
        own = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(self.home), "USER": self.name}
        own["TMPDIR"] = str(self.home.parent / "tmp")
        options = {"cwd": self.home, "text": True, "capture_output": True, "check": False, "timeout": 1500, **options}
        return subprocess.run(
            [*map(str, command)],
            env={**own, "LANG": "C.UTF-8", **(env or {})},
            user=self.name,
            group=self.name,
            extra_groups=[],
            umask=0o077,
            **options,
        )


@dataclass(frozen=True)
class Image:
    """An image, and what is known of its making."""

    path: Path
    builder_uid: int
    log: str


@pytest.fixture(scope="session")
def apptainer() -> Path:
    """The program."""
    return install_apptainer()


@pytest.fixture(scope="session")
def person() -> Iterator[Person]:
    """Somebody who may map user ids, as `useradd` arranges it, and may do nothing else."""
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_FOLDERS))
    folder.chmod(0o711)
    name, home = f"hpckv-t{os.getpid()}", folder / "home"
    try:
        _run("useradd", "--user-group", "--no-create-home", "--home-dir", home, "--shell", "/bin/sh", name)
        for place in (home, folder / "tmp"):
            place.mkdir(mode=0o700)
            shutil.chown(place, name, name)
        for kind in ("subuid", "subgid"):
            if f"{name}:" not in Path(f"/etc/{kind}").read_text():
                _run("usermod", f"--add-{kind}s", "20000000-20065535", name)
        yield Person(name, pwd.getpwnam(name).pw_uid, home)
    finally:
        _remove_user(name)
        for left in (folder, _KEPT / f"ci-{os.getpid()}", _FOLDERS / f"{name}.ch"):  # the last is Charliecloud's
            shutil.rmtree(left, ignore_errors=True)


@pytest.fixture(scope="session")
def checkout(person: Person) -> Path:
    """This source tree as that user would have cloned it, with what is not committed yet; there is a space in its name."""
    return _copy_of_the_tree(person)


@pytest.fixture(scope="session")
def rootfs() -> Path:
    """The folder of a small Debian, as a base that needs no registry."""
    recipe = f"{_SUITE} {_PACKAGES} {time.strftime('%Y-%m')}"  # fresh every month
    with _kept(f"rootfs-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}") as place:
        if not place.exists():
            _make_rootfs(place)
    return place


@pytest.fixture(scope="session")
def image(apptainer: Path, person: Person, checkout: Path, rootfs: Path) -> Image:
    """Built from containers/hpckv-cpu.def."""
    name = f"hpckv-cpu-{_digest(checkout, rootfs)}"
    with _kept(f"{name}.sif") as place:
        record = place.with_suffix(".json")
        if not record.exists():
            built = person.home / "built.sif"
            done = build(person, checkout, "cpu", "--base", rootfs, "-o", built)
            assert done.returncode == 0, done.stdout + done.stderr
            said = {"builder_uid": built.stat().st_uid, "log": done.stdout + done.stderr}
            shutil.move(built, place)
            shutil.chown(place, "root", "root")  # the next test run's user may get this one's number
            record.write_text(json.dumps(said))  # last: with it the image is whole
        place.chmod(0o755)
    return Image(place, **json.loads(record.read_text()))


@pytest.fixture(scope="session")
def sif(image: Image) -> Path:
    """The file."""
    return image.path


def build(person: Person, checkout: Path, *arguments: object, **options) -> subprocess.CompletedProcess:
    """containers/build.sh as that user, whose pip is told what ours knows of this machine's packages."""
    if "--torch-index" not in arguments and _pip_finds_torch():
        arguments = (*arguments, "--torch-index", "none")
    # Thousands of small files: in memory, where there is some.
    is_roomy = _SHM.is_dir() and shutil.disk_usage(_SHM).free > _BUILD_BYTES
    env = {**pip_settings(), "PIP_TRUSTED_HOST": SECRET, "TMPDIR": str(_SHM if is_roomy else _FOLDERS)}
    return person.run(checkout / "containers" / "build.sh", *arguments, env=env, **options)


def pip_settings() -> dict[str, str]:
    """What this machine's pip is told, by files or variables, as variables."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        variable = "PIP_" + name.rpartition(".")[2].upper().replace("-", "_")
        settings[variable] = " ".join(ast.literal_eval(value).split())
    return settings


def _pip_finds_torch() -> bool:
    """The build that the lock file names, without PyTorch's own index."""
    lock = (TOP / "containers" / "lock" / "cpu.txt").read_text().splitlines()
    torch = next(line for line in lock if line.startswith("torch=="))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", torch]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _copy_of_the_tree(person: Person) -> Path:
    copy = person.home / "a checkout"
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # looking changes nothing, not even the index's dates
    git = ["git", "-c", f"safe.directory={TOP}", "-C", str(TOP)]
    listed = subprocess.run(
        [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        env=quiet,
        capture_output=True,
        check=True,
    )
    _run("git", "-c", f"safe.directory={TOP}/.git", "clone", "--quiet", "--no-checkout", "--no-hardlinks", TOP, copy)
    _run("git", "-C", copy, "reset", "--quiet")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (TOP / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, copy / name)
    _run("chown", "-R", f"{person.name}:{person.name}", copy)
    return copy


def _digest(checkout: Path, rootfs: Path) -> str:
    """Of everything that goes into the image: its commit too, which is in a label."""
    commit = subprocess.run(
        ["git", "-c", f"safe.directory={checkout}", "-C", str(checkout), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=True,
    )
    digest = hashlib.sha256(f"{rootfs.name} {commit.stdout}".encode())
    names = ("hpckv", "slurm", "containers", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
    files = [
        path for name in names for path in sorted([checkout / name, *(checkout / name).rglob("*")]) if path.is_file()
    ]
    for path in files:
        digest.update(f"\0{path.relative_to(checkout)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _kept(name: str) -> Iterator[Path]:
    """Where something lies that the next test run may use; with CI set, where only this one looks."""
    folder = _KEPT / f"ci-{os.getpid()}" if os.environ.get("CI") else _KEPT
    folder.mkdir(parents=True, exist_ok=True)
    for old in _KEPT.iterdir():
        if old.exists() and time.time() - old.stat().st_mtime > _KEPT_S:
            _remove(old)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two test runs that want the same one makes it
        yield folder / name
    for path in folder.glob(f"{Path(name).stem}*"):
        os.utime(path)


def _make_rootfs(place: Path) -> None:
    """Essential packages, Python, and no device files, which a user could not copy."""
    if not shutil.which("mmdebstrap"):
        raise RuntimeError("sh tests/system_packages.sh installs what is missing: mmdebstrap")
    folder = Path(tempfile.mkdtemp(prefix=f"{place.name}.new-", dir=place.parent))
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("man", "doc", "locale", "info")]
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    # The system's own archive and no other; where it has no such file, mmdebstrap knows Debian's.
    archive = [str(sources)] if sources.exists() else []
    try:
        quick = ["--variant=essential", "--mode=root", "--dpkgopt=force-unsafe-io"]
        _run("mmdebstrap", "--quiet", *quick, f"--include={_PACKAGES}", *left_out, _SUITE, folder, *archive)
        _run("find", folder / "dev", "-mindepth", "1", "-delete")
        _run("chmod", "-R", "a+rX", folder)
        folder.rename(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """What test runs have left behind that were killed."""
    for entry in pwd.getpwall():
        if entry.pw_name.startswith("hpckv-t") and not Path(f"/proc/{entry.pw_name.removeprefix('hpckv-t')}").exists():
            _remove_user(entry.pw_name)
    for folder in [*_FOLDERS.glob(f"{_PREFIX}*"), *_KEPT.glob("ci-*")]:
        pid = folder.name.removeprefix(_PREFIX).removeprefix("ci-").partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            _remove(folder)


def _remove_user(name: str) -> None:
    subprocess.run(["userdel", name], capture_output=True, check=False)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip()[-2000:]}")
