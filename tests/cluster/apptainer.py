"""A real Apptainer for tests, on a Debian whose own archive has none: unstable's, with the C library that it was built for.

Installed once on a machine, in seconds, by root; a second call finds it. Nothing of the system's own libraries or package lists
is touched: the newer libraries lie in a folder that only these two programs look into. A machine's own Apptainer is used as it is.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_LIBRARIES = Path("/var/lib/hpckv-tests/apptainer")
_PROGRAM, _PARTS, _SETTINGS = (
    Path("/usr/bin/apptainer"),
    Path("/usr/lib/x86_64-linux-gnu/apptainer"),
    Path("/etc/apptainer"),
)
"""It finds its parts from where it really lies, so it has to lie where the package puts it."""
_SESSION = Path("/var/lib/apptainer/mnt/session")
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_ARCHIVE = f"deb [arch=amd64 signed-by={_KEYRING}] http://deb.debian.org/debian sid main\n"
_PACKAGES = ("apptainer", "libc6", "libseccomp2", "libsqlite3-0", "zlib1g")
_NEEDED = ("mksquashfs", "squashfuse", "newuidmap", "patchelf")
_FUSE = Path("/dev/fuse")


def apptainer() -> Path:
    """The program, installed if it is not there; raises RuntimeError with what is missing."""
    if missing := [name for name in _NEEDED if not shutil.which(name)]:
        raise RuntimeError(f"sh tests/system_packages.sh installs what is missing: {' '.join(missing)}")
    _let_everybody_mount_images()
    _LIBRARIES.parent.mkdir(parents=True, exist_ok=True)
    with (_LIBRARIES.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs on one machine
        found = shutil.which("apptainer")
        if found is None:
            _install()
            found = str(_PROGRAM)
    _run(found, "--version")
    return Path(found)


def _let_everybody_mount_images() -> None:
    """Users mount an image by FUSE; distributions give its device mode 0666, some virtual machines do not."""
    if not _FUSE.exists():
        raise RuntimeError(f"no {_FUSE}: this kernel cannot mount images for users")
    if _FUSE.stat().st_mode & 0o666 != 0o666:
        _FUSE.chmod(0o666)


def _install() -> None:
    with tempfile.TemporaryDirectory(prefix="hpckv-apptainer-", dir="/var/tmp") as name:
        folder = Path(name)
        _download(folder)
        for package in folder.glob("*.deb"):
            is_program = package.name.startswith("apptainer_")
            _run("dpkg-deb", "--extract", package, folder / ("program" if is_program else "libraries"))
        shutil.rmtree(_LIBRARIES, ignore_errors=True)
        shutil.copytree(folder / "libraries", _LIBRARIES, symlinks=True)
        program = folder / "program"
        for binary in (program / "usr/bin/apptainer", program / _PARTS.relative_to("/") / "bin/starter"):
            _use_own_libraries(binary)
        for place in (_PARTS, _SETTINGS):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(program / place.relative_to("/"), place, symlinks=True)
        _SESSION.mkdir(parents=True, exist_ok=True)
        # The program comes last and whole: where it is, everything else is.
        shutil.copy2(program / "usr/bin/apptainer", _PROGRAM.with_suffix(".new"))
        _PROGRAM.with_suffix(".new").replace(_PROGRAM)


def _download(folder: Path) -> None:
    """With package lists of its own, so that the system never sees unstable's."""
    sources = folder / "sources.list"
    sources.write_text(_ARCHIVE)
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    own = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/nonexistent",
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",  # the folder is not open to apt's own user
    }
    options = [part for key, value in own.items() for part in ("-o", f"{key}={value}")]
    _run("apt-get", *options, "-qq", "update")
    _run("apt-get", *options, "-qq", "download", *_PACKAGES, cwd=folder)


def _use_own_libraries(binary: Path) -> None:
    loader = next(_LIBRARIES.glob("**/ld-linux-x86-64.so.2"))
    places = sorted({str(path.parent) for path in _LIBRARIES.glob("**/lib*.so.*")})
    _run("patchelf", "--set-interpreter", loader, "--force-rpath", "--set-rpath", ":".join(places), binary)


def _run(*command: object, **options: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip()}")


if __name__ == "__main__":
    if os.geteuid():
        sys.exit("only root can install Apptainer")
    print(apptainer())
