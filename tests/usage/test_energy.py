"""Energy is said where a counter is one replica's alone, and nowhere else: made-up GPUs and packages, the real NVML's names."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from hpckv.usage import energy
from hpckv.usage.energy import EnergyMeter, NvmlSource, RaplSource, nvml_source, rapl_source


class RefusedError(Exception):
    pass


@dataclass
class Gpu:
    pids: list[int]
    millijoules: int = 0
    is_cut: bool = False


@dataclass
class Nvml:
    """NVML as its documentation has it, over made-up GPUs."""

    gpus: list[Gpu]
    refuses: str = ""
    NVMLError: type[Exception] = RefusedError
    calls: list[str] = field(default_factory=list)

    def __getattr__(self, name: str):
        if name not in ANSWERS:
            raise AttributeError(name)
        if self.refuses == name:
            return self._refuse
        return lambda *arguments: ANSWERS[name](self, *arguments)

    def _refuse(self, *_):
        raise RefusedError


ANSWERS = {
    "nvmlDeviceGetCount": lambda nvml: len(nvml.gpus),
    "nvmlDeviceGetHandleByIndex": lambda nvml, number: nvml.gpus[number],
    "nvmlDeviceGetComputeRunningProcesses": lambda nvml, gpu: [SimpleNamespace(pid=pid) for pid in gpu.pids],
    "nvmlDeviceGetUUID": lambda nvml, gpu: f"GPU-{nvml.gpus.index(gpu)}",
    "nvmlDeviceGetTotalEnergyConsumption": lambda nvml, gpu: gpu.millijoules,
    "nvmlDeviceGetMigMode": lambda nvml, gpu: [int(gpu.is_cut), 0],
}


def meter(nvml: Nvml, pids=(7,), num_gpus=1) -> EnergyMeter:
    return EnergyMeter(NvmlSource(nvml, frozenset(pids), num_gpus))


def test_the_real_nvml_has_these_names():
    for name in (*ANSWERS, "NVMLError", "nvmlInit"):
        assert hasattr(pynvml, name)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a driver here")
def test_without_a_driver_there_is_no_energy():
    assert nvml_source(frozenset({os.getpid()}), 1) is None
    assert EnergyMeter(None).joules is None


def test_joules_of_the_gpus_that_only_this_replica_computes_on():
    own, others = [Gpu([7], 10_000), Gpu([8], 20_000)], Gpu([9], 5_000)
    found = meter(Nvml([own[0], others, own[1]]), pids=(7, 8), num_gpus=2)
    assert found.joules == 0.0
    own[0].millijoules += 1_500
    own[1].millijoules += 500
    others.millijoules += 99_000
    assert found.joules == 2.0
    own[1].millijoules += 1_000
    assert found.joules == 3.0


@pytest.mark.parametrize(
    ("gpus", "num_gpus"),
    [
        ([Gpu([7, 9])], 1),  # somebody else computes there
        ([Gpu([7])], 2),  # one that the replica has is not seen
        ([Gpu([])], 1),  # processes are hidden
        ([Gpu([7], is_cut=True)], 1),  # one part of it is ours
    ],
)
def test_what_would_be_a_guess_is_not_said(gpus, num_gpus):
    assert meter(Nvml(gpus), num_gpus=num_gpus).joules is None


def test_a_gpu_that_cannot_be_cut_counts_and_one_that_has_no_counter_does_not():
    assert meter(Nvml([Gpu([7])], refuses="nvmlDeviceGetMigMode")).joules == 0.0
    assert meter(Nvml([Gpu([7])], refuses="nvmlDeviceGetTotalEnergyConsumption")).joules is None


def test_after_a_hole_nothing_more_is_said():
    gpu = Gpu([7], 1_000)
    found = meter(Nvml([gpu]))
    gpu.pids.append(9)
    assert found.joules is None
    gpu.pids.remove(9)
    assert found.joules is None


def test_a_driver_that_was_loaded_again_counts_from_0_and_is_not_believed():
    gpu = Gpu([7], 1_000_000)
    found = meter(Nvml([gpu]))
    gpu.millijoules = 10
    assert found.joules is None


@pytest.fixture
def machine(tmp_path) -> Path:
    """Two packages, one with a part of its own, and a job's step."""
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "dram"), ("intel-rapl:1", "package-1")):
        (tmp_path / "powercap" / zone).mkdir(parents=True)
        (tmp_path / "powercap" / zone / "name").write_text(f"{name}\n")
        (tmp_path / "powercap" / zone / "max_energy_range_uj").write_text("262143328850\n")
        count(tmp_path, zone, 1_000_000)
    step(tmp_path, 100, "slurmstepd: [41.batch]")
    step(tmp_path, 101, "slurmstepd: [41.0]")
    step(tmp_path, 102, "python -m hpckv.cli.main run")
    return tmp_path


def count(machine: Path, zone: str, microjoules: int) -> None:
    (machine / "powercap" / zone / "energy_uj").write_text(f"{microjoules}\n")


def step(machine: Path, pid: int, title: str) -> None:
    (machine / "proc" / str(pid)).mkdir(parents=True)
    (machine / "proc" / str(pid) / "cmdline").write_bytes(title.encode() + b"\0")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def packages(machine: Path, clock=Clock) -> tuple[EnergyMeter, Clock]:
    passing = clock()
    return EnergyMeter(RaplSource("41", machine / "powercap", machine / "proc"), passing), passing


def test_packages_are_added_up_and_go_round(machine):
    found, clock = packages(machine)
    count(machine, "intel-rapl:0", 5_000_000)
    count(machine, "intel-rapl:0:0", 9_000_000)
    clock.now = 60.0
    assert found.joules == pytest.approx(4.0)
    count(machine, "intel-rapl:0", 2_000_000)
    clock.now = 120.0
    assert found.joules == pytest.approx(4.0 + 262143.32885 - 3.0)


def test_a_counter_that_may_have_gone_round_twice_is_not_believed(machine):
    found, clock = packages(machine)
    clock.now = 263.0
    count(machine, "intel-rapl:0", 5_000_000)
    assert found.joules is None


def test_a_node_with_another_job_is_not_this_job_s(machine):
    found, _ = packages(machine)
    assert found.joules == 0.0
    step(machine, 103, "slurmstepd: [42.batch]")
    assert found.joules is None


def test_where_processes_are_hidden_or_counters_closed_nothing_is_said(machine):
    assert EnergyMeter(RaplSource("41", machine / "powercap", machine / "nowhere")).joules is None
    (machine / "powercap" / "intel-rapl:1" / "energy_uj").unlink()
    assert packages(machine)[0].joules is None


def test_only_a_job_with_all_cpus_of_its_node_has_the_node(machine, monkeypatch):
    monkeypatch.setattr(energy.os, "cpu_count", lambda: 8)
    whole = {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_CPUS_PER_NODE": "8"}
    places = (machine / "powercap", machine / "proc")
    assert rapl_source(whole, *places).read() is not None
    assert rapl_source({**whole, "SLURM_JOB_CPUS_PER_NODE": "4"}, *places) is None
    assert rapl_source({**whole, "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_CPUS_PER_NODE": "8(x2)"}, *places) is None
    assert rapl_source({}, *places) is None


def test_a_replica_that_shares_its_node_or_has_several_has_none():
    pids = frozenset({os.getpid()})
    assert energy.energy_meter("cpu", pids, 1, is_on_one_node=True, has_node=False).joules is None
    assert energy.energy_meter("cuda", pids, 2, is_on_one_node=False, has_node=True).joules is None
