"""How many pages there is room for, and under which namespace their blocks are known. No torch tensors are made here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hpckv.comm import ParallelDims
from hpckv.device import Capability
from hpckv.device.capability import DTYPES, available_memory_bytes
from hpckv.engine.config import EngineConfig
from hpckv.errors import AccessError, CapabilityError
from hpckv.kvcache import CacheConfig
from hpckv.kvcache.page_pool import NUM_RESERVED
from hpckv.model import ModelConfig
from hpckv.model.files import weight_files
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
    owned: BlockGeometry
    """The part of a block that this rank writes to a store."""
    whole: BlockGeometry
    """Blocks as all ranks together hold them."""

    @property
    def num_usable(self) -> int:
        return self.num_pages - NUM_RESERVED

    def at_most(self, num_tokens: int) -> PagePlan:
        """No more pages than a run of `num_tokens` cached tokens can use."""
        return self.of(min(self.num_pages, NUM_RESERVED + 1 + -(-num_tokens // self.geometry.block_tokens)))

    def of(self, num_pages: int) -> PagePlan:
        return replace(self, num_pages=num_pages)


def plan_pages(
    model: ModelConfig,
    folder: Path,
    cache: CacheConfig,
    device: Capability,
    dtype: str,
    dims: ParallelDims,
    num_local: int = 1,
) -> PagePlan:
    """Divide the device's memory; raises `CapabilityError` if model and one page do not fit, before anything is loaded.

    `num_local` processes share a CPU's memory.
    """
    weight_files(folder)
    item = DTYPES[dtype]
    whole = BlockGeometry(model.num_kv_heads, model.num_layers, cache.block_tokens, model.head_dim, item)
    layers, heads = dims.layers(model.num_layers), dims.heads(model.num_heads, model.num_kv_heads)
    geometry = whole.with_box(heads.kv.start, heads.kv.stop, layers.start, layers.stop)
    owned = whole.with_box(heads.owned_kv.start, heads.owned_kv.stop, layers.start, layers.stop)
    weights = int(model.num_parameters * item * _WORKSPACE / (dims.tp * dims.pp))
    free = device.memory_bytes if device.kind == "cuda" else available_memory_bytes() // num_local
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
    return PagePlan(geometry, num_pages, owned, whole)


def build_namespace(
    weights: str,
    model: ModelConfig,
    cache: CacheConfig,
    engine: EngineConfig,
    device: Capability,
    dtype: str,
    tensor_ranks: int = 1,
) -> Namespace:
    """Identity and representation of an engine's blocks; `weights` is the digest of the model's."""
    identity = Identity(weights=weights, config=model.raw)
    representation: dict[str, object] = {
        "dtype": dtype,
        "block_tokens": cache.block_tokens,
        "layers_per_tile": BlockGeometry.layers_per_tile,
        "numerics": engine.numerics,
    }
    if engine.numerics == "strict":  # bit equality holds on one kind of hardware and library only
        import torch

        representation["arithmetic"] = device.arithmetic_class
        representation["torch"] = torch.__version__
        if device.kind == "cpu":
            representation["threads"] = torch.get_num_threads()
        if tensor_ranks > 1:  # they add partial sums, one device adds them in another order
            representation["tensor_ranks"] = tensor_ranks
    return Namespace(identity, representation)


def digest_weights(folder: Path) -> str:
    """Digest of the content of a model's weights, read in full unless it is remembered; raises `AccessError`."""
    try:
        return weights_digest(weight_files(folder), memory=default_memory())
    except OSError as error:
        raise AccessError(f"{error.filename or folder}: {error.strerror}") from None
