"""Rotary position embeddings and their scalings, as one table of cosines and sines over all positions.

Sources: RoFormer (arXiv 2104.09864); linear: Chen et al. (2306.15595); llama3 and yarn (2309.00071) with the
constants of transformers' `modeling_rope_utils.py`.

`dynamic` (NTK) leaves positions inside the trained context as they are and rescales *all* of them beyond it by the
sequence's length. Keys would then depend on tokens that come later, so no prefix could be reused: the context
ends at `max_position_embeddings`, where the scaling is the identity.
"""

from __future__ import annotations

import math

import torch

from hpckv.model.config import ModelConfig


def rope_table(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each (positions, 1, H) in fp32, the attention factor of the scaling included.

    The first half of the sines is negated: what `apply_rope` adds to the low half is minus the high half's.
    """
    frequencies, factor = inverse_frequencies(config)
    angle = torch.outer(torch.arange(config.max_positions, dtype=torch.float32), frequencies)
    cos = torch.cat((angle.cos(), angle.cos()), dim=-1) * factor
    sin = torch.cat((-angle.sin(), angle.sin()), dim=-1) * factor
    return cos[:, None].to(device), sin[:, None].to(device)


def apply_rope(x_TNH: torch.Tensor, cos_T1H: torch.Tensor, sin_T1H: torch.Tensor) -> torch.Tensor:
    """Rotate each head's halves against each other: (low, high) -> (low cos - high sin, high cos + low sin).

    The sine's sign is in the table (`rope_table`), cosine and sine are in x's dtype.
    """
    return torch.addcmul(x_TNH * cos_T1H, x_TNH.roll(x_TNH.shape[-1] // 2, dims=-1), sin_T1H)


def inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """(H / 2,) radians a position, and the factor on cos and sin."""
    rope, dim = config.rope, config.head_dim
    plain = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    given = rope.parameters
    if rope.kind == "linear":
        return plain / given["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(plain, config), 1.0
    if rope.kind == "yarn":
        return _yarn(config)
    return plain, 1.0


def _llama3(plain: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    given = config.rope.parameters
    factor, low, high = given["factor"], given["low_freq_factor"], given["high_freq_factor"]
    original = given.get("original_max_position_embeddings") or config.max_positions
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > original / low, plain / factor, plain)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    is_between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(is_between, blended, scaled)


def _yarn(config: ModelConfig) -> tuple[torch.Tensor, float]:
    given, dim, theta = config.rope.parameters, config.head_dim, config.rope.theta
    original = given.get("original_max_position_embeddings") or config.max_positions
    factor = given.get("factor") or config.max_positions / original

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(given.get("beta_fast") or 32), dimension_of(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    period = theta ** (torch.arange(0, dim, 2).float() / dim)
    frequencies = (1 / (factor * period)) * (1 - keep) + (1 / period) * keep
    return frequencies, _yarn_attention_factor(config, factor)


def _yarn_attention_factor(config: ModelConfig, factor: float) -> float:
    given = config.rope.parameters
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
    return mscale(1.0)
