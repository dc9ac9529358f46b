"""Root-mean-square norm, and Gemma's form of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hpckv.model.config import ModelConfig
from hpckv.model.weights import WeightSource


class RMSNorm:
    """x / rms(x) * weight; with `norm_adds_one`, times 1 + weight in fp32."""

    def __init__(self, config: ModelConfig, source: WeightSource, name: str, size: int) -> None:
        self.eps = config.norm_eps
        self.size = (size,)
        self.adds_one = config.norm_adds_one
        self.weight = source.take(f"{name}.weight", (size,))
        if self.adds_one:
            self.weight = 1.0 + self.weight.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.adds_one:
            return F.rms_norm(x.float(), self.size, self.weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.size, self.weight, self.eps)
