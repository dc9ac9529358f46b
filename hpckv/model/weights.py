"""Tensors of a Hugging Face folder, streamed: each rank reads only its own slices, and nothing is left over.

Truncated, missing, misshapen and surplus tensors are errors that name the tensor and the file. Nothing here is
pickled: only safetensors are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hpckv.errors import ModelError
from hpckv.model.files import weight_files

# Buffers that some checkpoints carry and that follow from the configuration.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")


def stored_bytes(folder: Path) -> int:
    """Bytes of all weight files, without reading them."""
    return sum(file.stat().st_size for file in weight_files(folder))


class WeightSource:
    """Hands out each tensor once. Use: construct, let the model `take` its tensors, then `finish()`."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._where: dict[str, tuple[Path, Any]] = {}
        self._taken: set[str] = set()
        for file in weight_files(folder):
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: damaged or truncated safetensors ({error})") from None
            self._where.update((name, (file, handle)) for name in handle.offset_keys())

    def has(self, name: str) -> bool:
        return name in self._where

    def take(
        self, name: str, shape: Sequence[int], rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        """A tensor whose whole shape is `shape`, or the given rows and columns of it, in the model's dtype."""
        if name not in self._where:
            raise ModelError(f"tensor {name} is missing from the model's safetensors")
        file, handle = self._where[name]
        part = handle.get_slice(name)
        if tuple(part.get_shape()) != tuple(shape):
            raise ModelError(
                f"{file}: tensor {name} has shape {part.get_shape()}, the configuration says {list(shape)}"
            )
        self._taken.add(name)
        try:
            tensor: torch.Tensor = part[rows or slice(None)] if columns is None else part[rows or slice(None), columns]
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ModelError(f"{file}: tensor {name} cannot be read ({error})") from None
        if not tensor.is_floating_point():
            raise ModelError(f"{file}: tensor {name} is {tensor.dtype}; quantised weights are not read by this version")
        return tensor.to(self.device, self.dtype)

    def finish(self, *, unused: Callable[[str], bool] = lambda name: False) -> None:
        """Raise `ModelError` naming tensors that nobody took, those that are `unused` here and known buffers aside."""
        left = [n for n in self._where if n not in self._taken and not unused(n) and not n.endswith(_IGNORED_SUFFIXES)]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ModelError(
                f"left-over tensors that this architecture does not use: {', '.join(sorted(left)[:3])}{more}"
            )
