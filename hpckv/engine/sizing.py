"""How many pages there is room for, and under which namespace their blocks are known. No torch tensors are made here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpckv.device import Capability
from hpckv.device.capability import DTYPES, available_memory_bytes
from hpckv.engine.config import EngineConfig
from hpckv.errors import AccessError, CapabilityError
from hpckv.kvcache import CacheConfig
from hpckv.kvcache.page_pool import NUM_RESERVED
from hpckv.model import ModelConfig
from hpckv.model.weights import weight_files
from hpckv.quantity import ByteSize, format_bytes
from hpckv.store import BlockGeometry, Identity, Namespace, weights_digest
from hpckv.store.identity import default_memory

_WORKSPACE = 1.2
"""A loaded model takes its weights and, while it loads and runs, about a fifth more."""


@dataclass(frozen=True)
class PagePlan:
    """Pages on the device, the reserved ones included."""

    geometry: BlockGeometry
    num_pages: int

    @property
    def num_usable(self) -> int:
        return self.num_pages - NUM_RESERVED

    def at_most(self, num_tokens: int) -> PagePlan:
        """No more pages than a run of `num_tokens` cached tokens can use."""
        return PagePlan(
            self.geometry, min(self.num_pages, NUM_RESERVED + 1 + -(-num_tokens // self.geometry.block_tokens))
        )


def plan_pages(
    model: ModelConfig,
    folder: Path,
    cache: CacheConfig,
    device: Capability,
    dtype: str,
) -> PagePlan:
    """Divide the device's memory; raises `CapabilityError` if model and one page do not fit, before anything is loaded."""
    weight_files(folder)
    item = DTYPES[dtype]
    geometry = BlockGeometry(model.num_kv_heads, model.num_layers, cache.block_tokens, model.head_dim, item)
    weights = int(model.num_parameters * item * _WORKSPACE)
    free = device.memory_bytes if device.kind == "cuda" else available_memory_bytes()
    room = free - weights
    if isinstance(cache.device_memory, str):
        wanted = ByteSize.parse(cache.device_memory)
        if wanted > room:
            raise CapabilityError(
                f"cache.device_memory: {wanted} of pages and {format_bytes(weights)} for the model do not fit the "
                f"{format_bytes(free)} that are free"
            )
        room = wanted
    elif device.kind == "cuda":
        room = int(free * cache.device_memory) - weights
    else:
        room = int(room * cache.device_memory / 2)
    num_pages = room // geometry.block_bytes
    if num_pages <= NUM_RESERVED and isinstance(cache.device_memory, str):
        raise CapabilityError(
            f"cache.device_memory: {cache.device_memory} holds {num_pages} pages of {format_bytes(geometry.block_bytes)}, "
            f"at least {NUM_RESERVED + 1} are needed"
        )
    if num_pages <= NUM_RESERVED:
        raise CapabilityError(
            f"the model does not fit: {model.num_parameters / 1e6:,.0f} M parameters in {dtype} need {format_bytes(weights)}, "
            f"{format_bytes(free)} of memory are free, and pages of {format_bytes(geometry.block_bytes)} come on top"
        )
    return PagePlan(geometry, num_pages)


def build_namespace(
    folder: Path, model: ModelConfig, cache: CacheConfig, engine: EngineConfig, device: Capability, dtype: str
) -> Namespace:
    """Identity and representation of an engine's blocks. Reads all weights, to digest them, unless their digest is known."""
    import torch

    try:
        identity = Identity(weights=weights_digest(weight_files(folder), memory=default_memory()), config=model.raw)
    except OSError as error:
        raise AccessError(f"{error.filename or folder}: {error.strerror}") from None
    representation: dict[str, object] = {
        "dtype": dtype,
        "block_tokens": cache.block_tokens,
        "layers_per_tile": BlockGeometry.layers_per_tile,
        "numerics": engine.numerics,
    }
    if engine.numerics == "strict":  # bit equality holds on one kind of hardware and library only
        representation["arithmetic"] = device.arithmetic_class
        representation["torch"] = torch.__version__
        if device.kind == "cpu":
            representation["threads"] = torch.get_num_threads()
    return Namespace(identity, representation)
