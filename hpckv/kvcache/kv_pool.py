"""The device's pages as tensors, and a block's bytes to and from a page. The only place where tensors become bytes.

Shapes: L layers, P pages, S slots in a page, X = P * S, K KV heads, H head size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import numpy as np
import torch

from hpckv.kvcache.cache_manager import Connector
from hpckv.kvcache.load_policy import LoadPolicy
from hpckv.kvcache.page_pool import NUM_RESERVED
from hpckv.log import warn_once
from hpckv.store import BlockGeometry, TieredStore
from hpckv.store.direct_io import BufferPool, Undo
from hpckv.store.fetch import Fetch, Loaded
from hpckv.store.segment import StoredBlock

_log = logging.getLogger(__name__)


class KVPool:
    """Keys and values of every layer: one (L, 2, X, K, H) tensor; page p is slots [p * S, (p + 1) * S)."""

    def __init__(
        self,
        geometry: BlockGeometry,
        *,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        buffers: BufferPool | None = None,
    ) -> None:
        """Blocks are copied out into `buffers`."""
        g = geometry
        self.geometry = geometry
        self.num_pages = num_pages
        self._buffers = buffers or BufferPool(geometry.block_bytes)
        if device.type == "cuda":
            self._buffers.on_new = pin_memory
        shape = (g.num_layers, 2, num_pages * g.block_tokens, g.num_kv_heads, g.head_dim)
        self.tensor = torch.empty(shape, dtype=dtype, device=device)
        # Padding is masked out, but 0 * NaN would not be.
        self.tensor[:, :, : NUM_RESERVED * g.block_tokens].zero_()
        self.layers = [(layer[0], layer[1]) for layer in self.tensor]

    def read_block(self, page: int) -> memoryview:
        """A copy of the page in the store's order: KV head, layer, K|V, token, dim. Nobody changes it any more."""
        block = self._page(page).permute(3, 0, 1, 2, 4)
        copy = self._buffers.take()
        into = torch.from_numpy(np.frombuffer(copy, dtype=np.uint8)).view(self.tensor.dtype).view(block.shape)
        into.copy_(block.contiguous() if block.is_cuda else block)  # one large transfer, not one a row
        return copy

    def write_block(self, page: int, payload: memoryview) -> None:
        """The reverse of `read_block`."""
        g = self.geometry
        data = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8)).to(self.tensor.device).view(self.tensor.dtype)
        block = data.view(g.num_kv_heads, g.num_layers, 2, g.block_tokens, g.head_dim)
        self._page(page).copy_(block.permute(1, 2, 3, 0, 4))

    def write_blocks(self, pages: Sequence[int], blocks: Sequence[Loaded]) -> None:
        """Copy loaded blocks into pages."""
        for page, loaded in zip(pages, blocks, strict=True):
            self.write_block(page, loaded.payload)

    def _page(self, page: int) -> torch.Tensor:
        size = self.geometry.block_tokens
        return self.tensor[:, :, page * size : (page + 1) * size]


class StoreConnector(Connector):
    """Moves blocks between a `KVPool` and a `TieredStore`."""

    def __init__(self, pool: KVPool, store: TieredStore, policy: LoadPolicy) -> None:
        self._pool, self._store, self.policy = pool, store, policy

    def match(self, keys: Sequence[bytes]) -> int:
        return self._store.match(keys)

    def fetch(self, keys: Sequence[bytes], parent: bytes) -> Fetch | None:
        geometry = self._pool.geometry
        if not self.policy.should_load(len(keys) * geometry.block_tokens, len(keys) * geometry.block_bytes):
            return None
        return self._store.fetch(keys, parent)

    def place(self, fetch: Fetch, first: int, pages: Sequence[int]) -> None:
        self._pool.write_blocks(pages, fetch.loaded[first : first + len(pages)])
        self.policy.note_load(len(fetch.loaded) * self._pool.geometry.block_bytes, fetch.seconds)

    def end(self, fetch: Fetch) -> None:
        fetch.is_over = True

    def offload(self, key: bytes, parent: bytes, position: int, page: int) -> None:
        self._store.save(StoredBlock(key, parent, position, self._pool.read_block(page)), keeps_payload=True)


def pin_memory(address: int, num_bytes: int) -> Undo | None:
    """Register host memory with the GPU's driver, which then copies from it and to it directly; how to end that."""
    cuda = torch.cuda.cudart()
    failed = int(cuda.cudaHostRegister(address, num_bytes, 0))
    if not failed:
        return partial(cuda.cudaHostUnregister, address)
    with suppress(RuntimeError):  # the driver would report it once more, to whoever asks it next
        torch.zeros(1, device="cuda")
    warn_once(_log, f"host memory could not be pinned (CUDA error {failed}); copies are slower")
    return None
