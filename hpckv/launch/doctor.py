"""What of this machine a run needs and has: one finding a matter, each with what to do about it. No torch in this process.

Programs and filesystems that hang are given up after `PATIENCE_S`, so that all of it takes less than a minute.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from hpckv.errors import HpckvError
from hpckv.quantity import format_bytes
from hpckv.store.local_disk import filesystem_type, find_local_folder

PATIENCE_S = 20.0
_PROBE_BYTES = 64 * 1024**2
_LITTLE_BYTES = 20 * 1024**3
_SHM_BYTES = 1024**3


class Verdict(Enum):
    """How a matter stands."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One matter."""

    matter: str
    verdict: Verdict
    found: str
    remedy: str = ""
    """What to do; empty where nothing need be."""


_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({
    "version": torch.__version__,
    "built_for": torch.version.cuda,
    "architectures": torch.cuda.get_arch_list() if cuda else [],
    "gpus": [[gpu.name, gpu.major, gpu.minor] for gpu in gpus],
}))
"""
_MPI = """
from hpckv.comm.mpi_group import MpiGroup, start_mpi
from hpckv.comm.group import Watch
import numpy as np
mpi = start_mpi()
group = MpiGroup.world(mpi)
least = np.array([group.rank], np.int32)
Watch(10.0).wait(group.reduce_min(least), "the other rank")
if group.rank == 0:  # one writes: unbuffered, what two print is mixed letter by letter
    print("ranks:", group.size, flush=True)
mpi.Finalize()
"""


def examine(directory: Path) -> Iterator[Finding]:
    """Every finding, as it is made; `directory` is where a store or run is, or will be."""
    yield _torch()
    yield from _mpi()
    yield from _slurm()
    yield _container()
    yield from _filesystem(directory)
    yield _local_disk(directory)
    yield from _limits()


def judge_torch(seen: dict[str, object], has_driver: bool) -> Finding:
    """`seen` is what torch says of itself; `has_driver` whether the machine has an NVIDIA driver."""
    version, gpus, architectures = seen["version"], seen["gpus"], seen["architectures"]
    assert isinstance(gpus, list)
    assert isinstance(architectures, list)
    if not gpus:
        if has_driver:
            remedy = (
                "a CPU build of torch: install one for CUDA"
                if not seen["built_for"]
                else "apptainer needs --nv; in a job ask for GPUs; else the driver is older than this torch's CUDA"
            )
            return Finding("GPU", Verdict.FAIL, f"torch {version} sees no GPU, though there is a driver", remedy)
        return Finding("GPU", Verdict.WARN, f"torch {version}, no GPU on this machine", "ask again on a compute node")
    names = ", ".join(dict.fromkeys(f"{name} (sm_{major}{minor})" for name, major, minor in gpus))
    # Code for an older minor version of the same generation runs; of another generation it does not.
    missing = [
        f"sm_{major}{minor}"
        for _, major, minor in gpus
        if not any(_runs(architecture, major, minor) for architecture in architectures)
    ]
    if missing:
        remedy = (
            "for a V100 install torch's cu126 build, newer CUDA has no code for it; the image hpckv-cu126-v100 has one"
        )
        return Finding("GPU", Verdict.FAIL, f"{names}: torch {version} has no code for {', '.join(missing)}", remedy)
    return Finding("GPU", Verdict.PASS, f"{len(gpus)} x {names}, torch {version}")


def _runs(architecture: str, major: int, minor: int) -> bool:
    kind, _, digits = architecture.partition("_")
    digits = digits.rstrip("af")
    if not digits.isdigit():
        return False
    built_major, built_minor = divmod(int(digits), 10)
    if kind == "compute":  # intermediate code, compiled by the driver
        return (built_major, built_minor) <= (major, minor)
    return built_major == major and built_minor <= minor


def _torch() -> Finding:
    done = _run([sys.executable, "-c", _TORCH])
    if done is None or done.returncode:
        why = done.stderr.strip().splitlines()[-1] if done and done.stderr.strip() else "it gives no answer"
        return Finding("GPU", Verdict.FAIL, f"torch cannot be imported: {why}", "install it: pip install torch")
    return judge_torch(json.loads(done.stdout), Path("/proc/driver/nvidia/version").exists())


def _mpi() -> Iterator[Finding]:
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        remedy = "pip install mpich, or module load an MPI; without one ranks meet by Slurm's variables"
        yield Finding("MPI", Verdict.WARN, "no mpiexec here", remedy)
    else:
        done = _run([mpiexec, "-n", "2", sys.executable, "-c", _MPI])
        if done and not done.returncode and "ranks: 2" in done.stdout:
            yield Finding("MPI", Verdict.PASS, f"two ranks met by {mpiexec}")
        else:
            said = done.stderr.strip().splitlines()[-1:] if done else []
            why = said[0] if said else "gives no answer" if done is None else "two ranks that do not see each other"
            remedy = "mpi4py's MPI and mpiexec's must be the same; pip install mpich brings both"
            yield Finding("MPI", Verdict.FAIL, f"{mpiexec}: {why}", remedy)
    if shutil.which("srun"):
        done = _run(["srun", "--mpi=list"])
        kinds = done.stdout + done.stderr if done else ""
        if "pmi2" in kinds or "pmix" in kinds:
            found = ", ".join(kind for kind in ("pmi2", "pmix") if kind in kinds)
            yield Finding("srun's MPI", Verdict.PASS, f"srun --mpi={found.replace(', ', ' or --mpi=')}")
        else:
            remedy = "nothing need be done: ranks meet by Slurm's variables"
            yield Finding("srun's MPI", Verdict.WARN, "srun offers neither pmi2 nor pmix", remedy)


def _slurm() -> Iterator[Finding]:
    if not shutil.which("sbatch"):
        yield Finding("Slurm", Verdict.WARN, "no sbatch here", "hpckv run works without; hpckv status knows no jobs")
        return
    version = _run(["sinfo", "--version"])
    name = (version.stdout.strip() if version else "") or "Slurm"
    done = _run(["sinfo", "-h", "-o", "%P"])
    if done and not done.returncode:
        yield Finding("Slurm", Verdict.PASS, name)
    else:
        why = done.stderr.strip().splitlines()[-1] if done and done.stderr.strip() else "gives no answer"
        yield Finding(
            "Slurm", Verdict.WARN, f"{name}: {why}", "ask from a login node of the cluster, or set SLURM_CONF"
        )
    done = _run(["sacct", "-n", "-X", "-S", "now-1hours"])
    if done and not done.returncode:
        yield Finding("sacct", Verdict.PASS, "answers")
    else:
        why = done.stderr.strip().splitlines()[0] if done and done.stderr.strip() else "gives no answer"
        yield Finding("sacct", Verdict.WARN, why, "jobs that are over will be UNKNOWN to hpckv status")


def _container() -> Finding:
    for name in ("apptainer", "singularity", "ch-run"):
        if shutil.which(name):
            done = _run([name, "--version"])
            said = (done.stdout or done.stderr).strip() if done else ""
            return Finding("container", Verdict.PASS, said if name in said else f"{name} {said}")
    remedy = "module load apptainer, if runs are to use an image; a virtual environment needs none"
    return Finding("container", Verdict.WARN, "neither apptainer nor singularity nor ch-run is here", remedy)


def _filesystem(directory: Path) -> Iterator[Finding]:
    """Writes, reads, renames and links there; hands back what it is and how much is free."""
    existing = _existing(directory)
    kind = filesystem_type(existing) or "unknown"
    trouble = _in_time(lambda: _try_files(existing))
    if trouble:
        yield Finding(
            "filesystem", Verdict.FAIL, f"{existing} ({kind}): {trouble}", "choose another folder, or ask for access"
        )
        return
    if kind in ("tmpfs", "ramfs"):
        remedy = "it is gone with the node, and takes memory: choose a disk for a store or for answers"
        yield Finding("filesystem", Verdict.WARN, f"{existing} is in memory ({kind})", remedy)
    else:
        yield Finding("filesystem", Verdict.PASS, f"{existing} ({kind}): write, fsync, rename, link and read are right")
    space = os.statvfs(existing)
    free, files = space.f_bavail * space.f_frsize, space.f_favail
    text = f"{format_bytes(free)} and {files:,} files free" if space.f_files else f"{format_bytes(free)} free"
    is_little = free < _LITTLE_BYTES or (space.f_files and files < 10_000)
    remedy = "a store takes its quota beside; hpckv store gc frees some; your own quota may be less: lfs quota, quota"
    yield Finding("space", Verdict.WARN if is_little else Verdict.PASS, text, remedy if is_little else "")
    yield _group(existing)


def _existing(directory: Path) -> Path:
    """It, or the nearest folder above that is there."""
    return next(folder for folder in (directory, *directory.resolve().parents) if folder.is_dir())


def _group(folder: Path) -> Finding:
    status = os.stat(folder)
    mask = os.umask(0)
    os.umask(mask)
    is_shared = bool(status.st_mode & 0o2000)
    if is_shared and status.st_gid not in (*os.getgroups(), os.getegid()) and os.geteuid():
        return Finding(
            "group", Verdict.FAIL, f"{folder} belongs to group {status.st_gid}, which is not yours", "newgrp, or ask"
        )
    if is_shared and mask & 0o070:
        found = f"umask {mask:04o} hides new files from the group of {folder}"
        return Finding("group", Verdict.WARN, found, "hpckv store sets modes itself; for run directories: umask 007")
    found = f"group {status.st_gid}{' (setgid)' if is_shared else ''}, umask {mask:04o}"
    return Finding("group", Verdict.PASS, found)


def _try_files(folder: Path) -> str:
    """What does not work as it must; empty if all does."""
    here = folder / f".hpckv-doctor-{secrets.token_hex(6)}"
    there, content = here.with_suffix(".b"), secrets.token_bytes(8192)
    try:
        fd = os.open(here, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            os.write(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.link(here, there)
        os.rename(here, there)  # two names of one file: nothing happens
        os.unlink(there)
        os.rename(here, there)
        if there.read_bytes() != content:
            return "what was written is read back as something else"
        if os.stat(folder).st_mode & 0o2000 and os.stat(there).st_gid != os.stat(folder).st_gid:
            return "new files do not get the folder's group although it is setgid"
    except OSError as error:
        return f"{error.strerror} ({error.filename or folder})"
    finally:
        for path in (here, there):
            path.unlink(missing_ok=True)
    return ""


def _local_disk(directory: Path) -> Finding:
    existing = _existing(directory)
    try:
        folder = find_local_folder("auto", existing)
    except HpckvError as error:
        return Finding("local disk", Verdict.FAIL, str(error), "correct HPCKV_LOCAL")
    if folder is None:
        return Finding(
            "local disk", Verdict.PASS, "not needed: the store's disk is not on the network, or none is here"
        )
    free = shutil.disk_usage(folder).free
    rate = _write_rate(folder)
    found = f"{folder} ({filesystem_type(folder)}): {format_bytes(free)} free, {format_bytes(rate)}/s written"
    if free < _LITTLE_BYTES:
        return Finding("local disk", Verdict.WARN, found, "name a larger one with HPCKV_LOCAL, or ask for --tmp")
    return Finding("local disk", Verdict.PASS, found)


def _write_rate(folder: Path) -> float:
    """Bytes a second, synced; once, so good for the order of magnitude."""
    path, data = folder / f".hpckv-doctor-{secrets.token_hex(6)}", secrets.token_bytes(_PROBE_BYTES)
    try:
        begun = time.perf_counter()
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return _PROBE_BYTES / (time.perf_counter() - begun)
    except OSError:
        return 0.0
    finally:
        path.unlink(missing_ok=True)


def _limits() -> Iterator[Finding]:
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).total if shm.is_dir() else 0
    remedy = "MPI and NCCL pass messages there; in a container bind the host's"
    yield Finding(
        "/dev/shm",
        Verdict.PASS if size >= _SHM_BYTES else Verdict.WARN,
        format_bytes(size),
        "" if size >= _SHM_BYTES else remedy,
    )
    if Path("/dev/infiniband").is_dir():
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        is_free = soft == resource.RLIM_INFINITY
        found = "locked memory is not limited" if is_free else f"locked memory is limited to {format_bytes(soft)}"
        remedy = "ulimit -l unlimited, or NCCL falls back from InfiniBand to TCP"
        yield Finding("InfiniBand", Verdict.PASS if is_free else Verdict.WARN, found, "" if is_free else remedy)


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    """None if the program is not there or gives no answer."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _in_time(work: Callable[[], str]) -> str:
    """What it returns; a filesystem that hangs is left to its thread."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return found[0] if found else f"no answer in {PATIENCE_S:g} s"
