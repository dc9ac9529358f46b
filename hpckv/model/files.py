"""Which files of a model's folder hold its weights. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from hpckv.errors import ModelError


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or all there are. Raises `ModelError`."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError):
            raise ModelError(f"{index}: not readable as a safetensors index") from None
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no safetensors files (weights in other formats are not read)")
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file}: missing, though {index.name} names it")
    return files
