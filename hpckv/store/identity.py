"""What decides the keys and values of given tokens, and how they are written down: identity, representation, namespace.

A block may be used only where both are equal, so both are complete: the weights' content, the whole model
configuration as it was read (an unknown field gives a new identity, never a silent hit), and every choice of this
program that changes a bit of the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

SCHEMA_VERSION = 1
LAYOUT_VERSION = 1

# Fields of config.json that name things and enter no computation.
_NAMES_ONLY = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})


def canonical_json(record: Mapping[str, Any]) -> bytes:
    """Sorted keys, no spaces, no NaN, ASCII: equal records give equal bytes."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def weights_digest(files: Iterable[Path]) -> str:
    """BLAKE3 of the content of the weight files in name order: not of a name, a path or a date."""
    whole = blake3()
    for file in sorted(files):
        hasher = blake3(max_threads=blake3.AUTO)
        hasher.update_mmap(file)
        whole.update(hasher.digest())
    return whole.hexdigest()


@dataclass(frozen=True)
class Identity:
    """Everything that decides the K/V values of given tokens."""

    weights: str
    """`weights_digest` of the model's files."""
    config: Mapping[str, Any]
    """`config.json`, every field kept."""
    quantization: str = "none"
    adapter: str = "none"

    @property
    def record(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "weights": self.weights,
            "config": {k: v for k, v in self.config.items() if k not in _NAMES_ONLY},
            "quantization": self.quantization,
            "adapter": self.adapter,
        }

    @property
    def digest(self) -> bytes:
        return blake3(canonical_json(self.record)).digest()


@dataclass(frozen=True)
class Namespace:
    """One identity in one representation: one directory of the store."""

    identity: Identity
    representation: Mapping[str, Any]
    """dtype, block_tokens, tile grid, numerics mode and what it depends on, layout version."""

    @property
    def record(self) -> dict[str, Any]:
        representation = {"layout": LAYOUT_VERSION, **self.representation}
        return {"identity": self.identity.record, "representation": representation}

    @property
    def digest(self) -> bytes:
        return blake3(canonical_json(self.record)).digest()

    @property
    def name(self) -> str:
        """Directory name: the full digest in hexadecimal."""
        return self.digest.hex()
