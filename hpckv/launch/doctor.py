"""What of this machine a run needs and has: one finding a matter, each with what to do about it. No torch in this process.

Everything is looked at at the same time, in threads that are not waited for beyond `LIMIT_S`: a program or filesystem that hangs
is a finding.
"""

from __future__ import annotations

import json
import queue
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

from hpckv.launch.doctor_disk import examine_disks
from hpckv.launch.finding import Clock, Finding, Verdict
from hpckv.quantity import format_bytes
from hpckv.store.durable import umask

LIMIT_S = 45.0
"""For all of it."""
_GRACE_S = 2.0
"""Until what was ended at the limit has been judged."""
_PROGRAM_S = 15.0
_SHM_BYTES = 1024**3

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


def examine(directory: Path, limit_s: float = LIMIT_S) -> Iterator[Finding]:
    """Every finding, in the same order always; `directory` is where a store or run is, or will be."""
    clock = Clock(limit_s)
    looks: dict[str, Callable[[], Iterable[Finding]]] = {
        "GPU": lambda: _torch(clock),
        "MPI": lambda: _mpi(clock),
        "srun's MPI": lambda: _srun(clock),
        "Slurm": lambda: _slurm(clock),
        "sacct": lambda: _sacct(clock),
        "container": lambda: _container(clock),
        "filesystem": lambda: examine_disks(directory, clock, umask()),
        "limits": _limits,
    }
    begun = [(matter, _begin(look)) for matter, look in looks.items()]
    try:
        for matter, answers in begun:
            yield from _answers(matter, answers, clock)
    finally:
        clock.stop()


def _begin(look: Callable[[], Iterable[Finding]]) -> queue.SimpleQueue[Finding | BaseException | None]:
    """Where its findings will come, and None after the last."""
    answers: queue.SimpleQueue[Finding | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for finding in look():
                answers.put(finding)
            answers.put(None)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            answers.put(error)

    threading.Thread(target=work, name="hpckv-doctor", daemon=True).start()
    return answers


def _answers(
    matter: str, answers: queue.SimpleQueue[Finding | BaseException | None], clock: Clock
) -> Iterator[Finding]:
    while True:
        try:
            answer = answers.get(timeout=max(0.0, clock.left_s + _GRACE_S))
        except queue.Empty:
            remedy = "something hangs that it needs: a folder in PATH, the filesystem of hpckv's own installation"
            yield Finding(matter, Verdict.FAIL, f"no answer in {clock.limit_s:g} s", remedy)
            return
        if answer is None:
            return
        if isinstance(answer, BaseException):
            raise answer
        yield answer


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


def _torch(clock: Clock) -> Iterator[Finding]:
    done = clock.run([sys.executable, "-c", _TORCH])
    if done is None or done.returncode:
        why = _said(done, -1) or "it gives no answer"
        yield Finding("GPU", Verdict.FAIL, f"torch cannot be imported: {why}", "install it: pip install torch")
    else:
        yield judge_torch(json.loads(done.stdout), Path("/proc/driver/nvidia/version").exists())


def _mpi(clock: Clock) -> Iterator[Finding]:
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        remedy = "pip install mpich, or module load an MPI; without one ranks meet by Slurm's variables"
        yield Finding("MPI", Verdict.WARN, "no mpiexec here", remedy)
        return
    done = clock.run([mpiexec, "-n", "2", sys.executable, "-c", _MPI])
    if done and not done.returncode and "ranks: 2" in done.stdout:
        yield Finding("MPI", Verdict.PASS, f"two ranks met by {mpiexec}")
    else:
        why = _said(done, -1) or ("gives no answer" if done is None else "two ranks that do not see each other")
        remedy = "mpi4py's MPI and mpiexec's must be the same; pip install mpich brings both"
        yield Finding("MPI", Verdict.FAIL, f"{mpiexec}: {why}", remedy)


def _srun(clock: Clock) -> Iterator[Finding]:
    if not shutil.which("srun"):
        return
    done = clock.run(["srun", "--mpi=list"], _PROGRAM_S)
    kinds = done.stdout + done.stderr if done else ""
    if "pmi2" in kinds or "pmix" in kinds:
        found = ", ".join(kind for kind in ("pmi2", "pmix") if kind in kinds)
        yield Finding("srun's MPI", Verdict.PASS, f"srun --mpi={found.replace(', ', ' or --mpi=')}")
    else:
        why = "srun gives no answer" if done is None else "srun offers neither pmi2 nor pmix"
        yield Finding("srun's MPI", Verdict.WARN, why, "nothing need be done: ranks meet by Slurm's variables")


def _slurm(clock: Clock) -> Iterator[Finding]:
    if not shutil.which("sbatch"):
        yield Finding("Slurm", Verdict.WARN, "no sbatch here", "hpckv run works without; hpckv status knows no jobs")
        return
    version = clock.run(["sinfo", "--version"], _PROGRAM_S)
    name = (version.stdout.strip() if version else "") or "Slurm"
    done = clock.run(["sinfo", "-h", "-o", "%P"], _PROGRAM_S)
    if done and not done.returncode:
        yield Finding("Slurm", Verdict.PASS, name)
    else:
        why = _said(done, -1) or "gives no answer"
        remedy = "ask from a login node of the cluster, or set SLURM_CONF"
        yield Finding("Slurm", Verdict.WARN, f"{name}: {why}", remedy)


def _sacct(clock: Clock) -> Iterator[Finding]:
    if not shutil.which("sbatch"):
        return
    done = clock.run(["sacct", "-n", "-X", "-S", "now-1hours"], _PROGRAM_S)
    if done and not done.returncode:
        yield Finding("sacct", Verdict.PASS, "answers")
    else:
        why = _said(done, 0) or "gives no answer"
        yield Finding("sacct", Verdict.WARN, why, "jobs that are over will be UNKNOWN to hpckv status")


def _container(clock: Clock) -> Iterator[Finding]:
    for name in ("apptainer", "singularity", "ch-run"):
        if shutil.which(name):
            done = clock.run([name, "--version"], _PROGRAM_S)
            said = (done.stdout or done.stderr).strip() if done else ""
            if said:
                yield Finding("container", Verdict.PASS, said if name in said else f"{name} {said}")
            else:
                remedy = f"try {name} --version by hand: runs with an image would hang in the same way"
                yield Finding("container", Verdict.FAIL, f"{name} gives no answer", remedy)
            return
    remedy = "module load apptainer, if runs are to use an image; a virtual environment needs none"
    yield Finding("container", Verdict.WARN, "neither apptainer nor singularity nor ch-run is here", remedy)


def _said(done: CompletedProcess[str] | None, which: int) -> str:
    """A line of what a program complained of; empty if it did not."""
    return done.stderr.strip().splitlines()[which] if done and done.stderr.strip() else ""


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
