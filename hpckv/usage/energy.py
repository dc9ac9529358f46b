"""Joules that one replica used, where the hardware counts them and nobody else's are in the count; nothing otherwise.

GPUs by NVML (`nvidia-ml-py`, if it is installed): those on which no process but this replica's is. On CPUs RAPL, which counts whole
packages: only in a job of Slurm's that has all CPUs of its one node and is alone there. What cannot be told apart is left out.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

_log = logging.getLogger(__name__)

_MOST_W = 1000.0
"""No package takes more: a RAPL counter that may have gone round twice since it was read says nothing."""
_POWERCAP, _PROC = Path("/sys/class/powercap"), Path("/proc")
_STEP = re.compile(rb"slurmstepd: \[(\d+)\.")


class Source(Protocol):
    """Counters of this replica's devices."""

    def read(self) -> dict[str, float] | None:
        """Joules by device, since whenever they were switched on; None if they are not all this replica's alone."""

    def since(self, before: float, now: float, device: str, seconds: float) -> float | None:
        """Joules between two readings; None if that cannot be said."""


class EnergyMeter:
    """Adds up what a source counts. What could not be said once is not said any more: a sum with a hole is a guess."""

    def __init__(self, source: Source | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._source, self._clock = source, clock
        self._lock = threading.Lock()
        self._joules = 0.0
        self._at, self._before = clock(), self._read()

    @property
    def joules(self) -> float | None:
        """Since this was made; from any thread."""
        with self._lock:
            before, now, seconds = self._before, self._read(), self._clock() - self._at
            if before is None or now is None or before.keys() != now.keys() or self._source is None:
                self._source = None
                return None
            parts = [self._source.since(before[name], now[name], name, seconds) for name in now]
            added = [part for part in parts if part is not None and part >= 0]
            if len(added) < len(parts):
                self._source = None
                return None
            self._at, self._before, self._joules = self._at + seconds, now, self._joules + sum(added)
            return self._joules

    def _read(self) -> dict[str, float] | None:
        return self._source.read() if self._source else None


def energy_meter(
    kind: str, pids: frozenset[int], num_gpus: int, *, is_on_one_node: bool, has_node: bool
) -> EnergyMeter:
    """Of a replica: `kind` is `cuda` or `cpu`, `pids` are its ranks'. `has_node`: no rank of another replica is on this node."""
    source: Source | None = None
    if is_on_one_node and kind == "cuda":
        source = nvml_source(pids, num_gpus)
    elif is_on_one_node and has_node:
        source = rapl_source(os.environ)
    return EnergyMeter(source)


class NvmlSource:
    """GPUs of this node on which only `pids` compute; there must be as many as the replica has."""

    def __init__(self, nvml: Any, pids: frozenset[int], num_gpus: int) -> None:
        self._nvml, self._pids, self._num_gpus = nvml, pids, num_gpus

    def read(self) -> dict[str, float] | None:
        nvml, found = self._nvml, {}
        try:
            for number in range(nvml.nvmlDeviceGetCount()):
                device = nvml.nvmlDeviceGetHandleByIndex(number)
                running = {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(device)}
                if not running & self._pids:
                    continue
                if running - self._pids or _is_cut(nvml, device):
                    return None
                found[str(nvml.nvmlDeviceGetUUID(device))] = nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1000
        except nvml.NVMLError:  # a GPU before Volta, a driver that is too old, a container that hides processes
            return None
        return found if len(found) == self._num_gpus else None

    def since(self, before: float, now: float, device: str, seconds: float) -> float | None:
        del device, seconds
        return now - before  # below 0 when the driver was loaded again


def nvml_source(pids: frozenset[int], num_gpus: int) -> NvmlSource | None:
    """None without the package, the library or a driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return NvmlSource(pynvml, pids, num_gpus)


def _is_cut(nvml: Any, device: Any) -> bool:
    """Whether this GPU is divided (MIG), so that its counter is of several."""
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(device)
    except nvml.NVMLError:  # it cannot be
        return False
    return bool(current)


class RaplSource:
    """The packages of a node that one job has to itself. Root may forbid to read them, as it often does."""

    def __init__(self, job: str, powercap: Path = _POWERCAP, proc: Path = _PROC) -> None:
        self._job, self._powercap, self._proc = job.encode(), powercap, proc
        self._ranges: dict[str, float] = {}

    def read(self) -> dict[str, float] | None:
        found: dict[str, float] = {}
        try:
            if set(_jobs_here(self._proc)) != {self._job}:
                return None
            for zone in sorted(self._powercap.glob("*:[0-9]*")):
                if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package-"):
                    found[zone.name] = int((zone / "energy_uj").read_text()) / 1e6
                    self._ranges[zone.name] = int((zone / "max_energy_range_uj").read_text()) / 1e6
        except (OSError, ValueError):
            return None
        return found or None

    def since(self, before: float, now: float, device: str, seconds: float) -> float | None:
        whole = self._ranges[device]
        if seconds * _MOST_W >= whole:
            return None
        return now - before if now >= before else now - before + whole


def rapl_source(environ: Mapping[str, str], powercap: Path = _POWERCAP, proc: Path = _PROC) -> RaplSource | None:
    """None unless this is a job of Slurm's with all CPUs of its only node."""
    job, nodes = environ.get("SLURM_JOB_ID"), environ.get("SLURM_JOB_NUM_NODES")
    if job is None or nodes != "1" or environ.get("SLURM_JOB_CPUS_PER_NODE") != str(os.cpu_count()):
        return None
    return RaplSource(job, powercap, proc)


def _jobs_here(proc: Path) -> Iterator[bytes]:
    """Jobs with a step on this node, whoever's: Slurm's own processes bear their numbers. Nobody's where processes are hidden."""
    for path in proc.glob("[0-9]*/cmdline"):
        try:
            found = _STEP.match(path.read_bytes())
        except OSError:  # it has ended
            continue
        if found:
            yield found[1]
