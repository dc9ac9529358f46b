"""Runs inside an image, when it is built and whenever asked: is what is installed what the lock file says, and has torch the code?

check.py [--mpi bind] [--architectures sm_70 sm_80 ...]     exit code 1, and a line for everything that is wrong
check.py --labels                              NAME VALUE lines for the image's labels
"""

import argparse
import atexit
import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).with_name("lock.txt")
NOT_LOCKED = {"hpckv", "pip"}
"""The package itself, and what the base brings to install it."""


def normal(name: str) -> str:
    """PEP 503: how names of packages are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(text: str) -> dict[str, str]:
    """Name -> version of every line."""
    pairs = (line.split("==") for line in text.split("\n") if line and not line.startswith("#"))
    return {normal(name): version for name, version in pairs}


def installed() -> dict[str, str]:
    """Name -> version of every package."""
    found = importlib.metadata.distributions()
    return {normal(package.metadata["Name"]): package.version for package in found}


def differences(wanted: dict[str, str], have: dict[str, str], mpi: str) -> list[str]:
    """A line for every package that is not as locked; the host's MPI takes the place of mpich."""
    left_out = {"mpich"} if mpi == "bind" else set()
    wanted = {name: version for name, version in wanted.items() if name not in left_out}
    have = {name: version for name, version in have.items() if name not in NOT_LOCKED}
    return [
        f"{name}: the lock file says {wanted.get(name, 'nothing')}, installed is {have.get(name, 'nothing')}"
        for name in sorted(wanted.keys() | have.keys())
        if wanted.get(name) != have.get(name)
    ]


def architectures() -> list[str]:
    """What torch has code for; it says so without a GPU too, as on the machines that images are built on."""
    import torch

    return torch.cuda.get_arch_list()


def missing_architectures(wanted: list[str], have: list[str]) -> list[str]:
    """A line if a GPU that the image is for would find no code."""
    missing = [name for name in wanted if name not in have]
    return [f"torch has no code for {' '.join(missing)}: it has {' '.join(have) or 'none'}"] if missing else []


def hpckv_version() -> str:
    """What the command says, so that it is known to start."""
    command = [Path(sys.executable).with_name("hpckv"), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def labels() -> dict[str, str]:
    """What is good to know of an image before it is run."""
    have = installed()
    return {
        "hpckv.version": have["hpckv"],
        "hpckv.python": platform.python_version(),
        "hpckv.torch": have["torch"],
        "hpckv.architectures": ",".join(architectures()) or "none",
        "hpckv.mpi4py": have["mpi4py"],
        "hpckv.mpich": have.get("mpich", "none"),
        "hpckv.glibc": platform.libc_ver()[1],
    }


def remove_empty_cache() -> None:
    """While an image is built the host's /tmp is there, and Python has made its folder for caches in it."""
    with contextlib.suppress(OSError):
        Path(os.environ["XDG_CACHE_HOME"]).rmdir()


def main() -> int:
    atexit.register(remove_empty_cache)
    parser = argparse.ArgumentParser()
    parser.add_argument("--architectures", nargs="*", default=[])
    parser.add_argument("--mpi", choices=["hybrid", "bind"], default="hybrid")
    parser.add_argument("--labels", action="store_true")
    options = parser.parse_args()
    if options.labels:
        print("\n".join(f"{name} {value}" for name, value in labels().items()))
        return 0
    wrong = differences(locked(LOCK.read_text()), installed(), options.mpi)
    wrong += missing_architectures(options.architectures, architectures())
    if hpckv_version() != installed()["hpckv"]:
        wrong.append(f"hpckv --version says {hpckv_version()}, installed is {installed()['hpckv']}")
    for line in wrong:
        print(f"hpckv: {line}", file=sys.stderr)
    if not wrong:
        said = labels()
        print(
            f"hpckv: as locked: hpckv {said['hpckv.version']}, torch {said['hpckv.torch']} ({said['hpckv.architectures']})"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
