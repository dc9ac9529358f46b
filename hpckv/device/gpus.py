"""The kinds of GPU that centres have, by their makers' data sheets: what a plan rests on where nothing was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuClass:
    """One kind."""

    name: str
    compute: tuple[int, int]
    memory_gb: float
    """10^9 bytes."""
    tflops: float
    """Dense matrix products in 16 bits, 10^12 operations a second."""
    bandwidth_gb_s: float
    """Of its memory, 10^9 bytes a second."""


GPU_CLASSES = (
    GpuClass("V100 16GB", (7, 0), 16, 125, 900),
    GpuClass("V100 32GB", (7, 0), 32, 125, 900),
    GpuClass("A100 40GB", (8, 0), 40, 312, 1555),
    GpuClass("A100 80GB", (8, 0), 80, 312, 2039),
    GpuClass("H100 80GB", (9, 0), 80, 989, 3350),
    GpuClass("H200 141GB", (9, 0), 141, 989, 4800),
)


def is_kind(part: str, name: str) -> bool:
    """Whether a GPU's name has all words of `part`: H100 is a kind of `NVIDIA H100 80GB HBM3`, A10 none of A100."""
    return set(words_of(part)) <= set(words_of(name))


def words_of(name: str) -> list[str]:
    """Of a GPU's name."""
    return re.findall(r"[a-z0-9]+", name.lower())


def gpu_class(name: str) -> GpuClass | None:
    """The class that a driver's or a site's name of a GPU means, such as `NVIDIA H100 80GB HBM3` or `a100`."""
    kinds = [gpu for gpu in GPU_CLASSES if is_kind(gpu.name.split()[0], name)]
    exact = [gpu for gpu in kinds if is_kind(gpu.name, name)]
    return next(iter(exact or kinds), None)
