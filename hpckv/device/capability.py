"""What a device can do, as a pure table: a V100 is tested without a V100. Only `probe` looks at the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from hpckv.errors import CapabilityError

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Dtypes a model is computed in, and their bytes."""


@dataclass(frozen=True)
class Capability:
    """One device. `compute` is (major, minor) of a CUDA device, () of a CPU."""

    kind: str
    name: str
    compute: tuple[int, ...] = ()
    memory_bytes: int = 0
    cpu_flags: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def label(self) -> str:
        """Its name in the ledger and in site files."""
        return self.name if self.kind == "cuda" else self.kind

    @property
    def has_bf16(self) -> bool:
        """bfloat16 arithmetic in hardware: sm_80 and newer, or a CPU with AMX or AVX512 for it."""
        if self.kind == "cuda":
            return self.compute >= (8, 0)
        return bool(self.cpu_flags & {"amx_bf16", "avx512_bf16"})

    @property
    def has_fp8(self) -> bool:
        return self.kind == "cuda" and self.compute >= (8, 9)

    @property
    def arithmetic_class(self) -> str:
        """Names the hardware whose strict-mode results are bit-equal; part of a strict representation."""
        if self.kind == "cuda":
            return f"{self.name} sm_{''.join(map(str, self.compute))}"
        isa = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in self.cpu_flags), "generic")
        return f"cpu {isa}"


def choose_dtype(wanted: str, stored: str, device: Capability) -> str:
    """The dtype to compute in. `auto` keeps the checkpoint's where the hardware has it.

    A bfloat16 checkpoint becomes float16 on a GPU older than sm_80 and float32 on a CPU without it.
    Raises `CapabilityError` for an explicit dtype the device cannot do in hardware.
    """
    if wanted == "auto":
        if stored == "float16" and device.kind == "cpu":
            return "float32"
        if stored == "bfloat16" and not device.has_bf16:
            return "float16" if device.kind == "cuda" else "float32"
        return stored if stored in DTYPES else "float32"
    if wanted not in DTYPES:
        raise CapabilityError(f"model.dtype: {wanted!r} is not one of auto, {', '.join(DTYPES)}")
    if wanted == "bfloat16" and device.kind == "cuda" and not device.has_bf16:
        raise CapabilityError(f"model.dtype: bfloat16 needs a GPU of sm_80 or newer, this is {device.arithmetic_class}")
    return wanted


def probe(kind: str = "auto") -> Capability:
    """Look at this machine: the current CUDA device if there is one (or `kind` says so), else the CPU."""
    import torch

    if kind not in ("auto", "cpu", "cuda"):
        raise CapabilityError(f"model.device: {kind!r} is not one of auto, cpu, cuda")
    if kind != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        compute = (properties.major, properties.minor)
        free, _ = torch.cuda.mem_get_info()  # others may be using this GPU too
        return Capability("cuda", properties.name, compute, free)
    if kind == "cuda":
        raise CapabilityError("model.device: cuda was asked for, and torch sees no CUDA device here")
    return processor()


def processor() -> Capability:
    """This machine's CPU."""
    return Capability("cpu", "CPU", (), available_memory_bytes(), _cpu_flags())


def available_memory_bytes() -> int:
    """Memory a process may still take: what the kernel calls available, less if a cgroup allows less."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        available = min(available, int(limit[0]) - int(used[0]))
    return available


def _cpu_flags() -> frozenset[str]:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
