"""The device's pages as tensors, and a block's bytes to and from a page. The only place where tensors become bytes.

Shapes: L layers, P pages, S slots in a page, X = P * S, K KV heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hpckv.kvcache.cache_manager import Connector
from hpckv.kvcache.page_pool import NUM_RESERVED
from hpckv.store import BlockGeometry, TieredStore
from hpckv.store.segment import StoredBlock


class KVPool:
    """Keys and values of every layer: one (L, 2, X, K, H) tensor; page p is slots [p * S, (p + 1) * S)."""

    def __init__(self, geometry: BlockGeometry, *, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        g = geometry
        self.geometry = geometry
        self.num_pages = num_pages
        shape = (g.num_layers, 2, num_pages * g.block_tokens, g.num_kv_heads, g.head_dim)
        self.tensor = torch.empty(shape, dtype=dtype, device=device)
        # Padding is masked out, but 0 * NaN would not be.
        self.tensor[:, :, : NUM_RESERVED * g.block_tokens].zero_()
        self.layers = [(layer[0], layer[1]) for layer in self.tensor]

    def read_block(self, page: int) -> memoryview:
        """A copy of the page in the store's order: KV head, layer, K|V, token, dim."""
        block = self._page(page).permute(3, 0, 1, 2, 4).contiguous().cpu()
        return memoryview(block.view(torch.uint8).flatten().numpy().data)

    def write_block(self, page: int, payload: memoryview) -> None:
        """The reverse of `read_block`."""
        g = self.geometry
        data = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8)).view(self.tensor.dtype)
        block = data.view(g.num_kv_heads, g.num_layers, 2, g.block_tokens, g.head_dim)
        self._page(page).copy_(block.permute(1, 2, 3, 0, 4))

    def _page(self, page: int) -> torch.Tensor:
        size = self.geometry.block_tokens
        return self.tensor[:, :, page * size : (page + 1) * size]


class StoreConnector(Connector):
    """Moves blocks between a `KVPool` and a `TieredStore`."""

    def __init__(self, pool: KVPool, store: TieredStore) -> None:
        self._pool, self._store = pool, store
        self._buffer = bytearray(pool.geometry.block_bytes)

    def match(self, keys: Sequence[bytes]) -> int:
        return self._store.match(keys)

    def onboard(self, keys: Sequence[bytes], pages: Sequence[int]) -> list[str]:
        tiers: list[str] = []
        view = memoryview(self._buffer)
        for number, (key, page) in enumerate(zip(keys, pages, strict=True)):
            # Parent and position matter to a tier that writes; the nearer tiers that get a copy here do not persist.
            parent = keys[number - 1] if number else bytes(len(key))
            tier = self._store.load(StoredBlock(key, parent, 0, b""), view)
            if tier is None:
                break
            self._pool.write_block(page, view)
            tiers.append(tier)
        return tiers

    def offload(self, key: bytes, parent: bytes, position: int, page: int) -> None:
        self._store.save(StoredBlock(key, parent, position, self._pool.read_block(page)))
