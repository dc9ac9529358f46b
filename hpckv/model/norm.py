"""Root-mean-square norm, and Gemma's form of it."""

from __future__ import annotations

import torch

from hpckv.model.config import ModelConfig
from hpckv.model.weights import WeightSource


class RMSNorm:
    """x / rms(x) * weight over the last axis, in fp32, rounded once; with `norm_adds_one`, times 1 + weight."""

    def __init__(self, config: ModelConfig, source: WeightSource, name: str, size: int) -> None:
        self.weight = source.take(f"{name}.weight", (size,)).float() + (1.0 if config.norm_adds_one else 0.0)
        self.mean = 1.0 / size
        self.eps = torch.full((1,), config.norm_eps, device=self.weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # Written out: torch's own form takes twice as long on a CPU, a pass over memory for each of its parts.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.eps, norm, norm, value=self.mean).rsqrt_()
        return (x * scale).mul_(self.weight).to(x.dtype)
