"""A page becomes bytes in the store's order and a page again, on every device and in every dtype; buffers are not mixed up."""

import numpy as np
import pytest
import torch

from hpckv.kvcache.kv_pool import KVPool
from hpckv.store import BlockGeometry
from hpckv.store.direct_io import is_aligned

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_pool(device: str, dtype: torch.dtype) -> KVPool:
    geometry = BlockGeometry(3, 5, block_tokens=4, head_dim=8, item_bytes=dtype.itemsize)
    pool = KVPool(geometry, num_pages=6, dtype=dtype, device=torch.device(device))
    pool.tensor.copy_(torch.randn(pool.tensor.shape))
    return pool


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_block_is_in_the_stores_order_and_comes_back(device, dtype):
    pool = make_pool(device, dtype)
    payload = pool.read_block(3)
    values = torch.frombuffer(bytearray(payload), dtype=dtype).view(3, 5, 2, 4, 8)
    for head, layer, kv in [(0, 0, 0), (2, 4, 1), (1, 3, 0)]:
        assert torch.equal(values[head, layer, kv], pool.tensor[layer, kv, 12:16, head].cpu())
    before = pool.tensor[:, :, 12:16].clone()
    pool.write_block(5, payload)
    assert torch.equal(pool.tensor[:, :, 20:24], before)


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_that_are_still_held_keep_their_bytes(device):
    pool = make_pool(device, torch.float32)
    held = [bytes(pool.read_block(page)) for page in range(6)]
    kept = [pool.read_block(page) for page in range(6)]
    again = [pool.read_block(page) for page in range(6)]
    assert [bytes(view) for view in kept] == [bytes(view) for view in again] == held
    assert all(np.frombuffer(view, np.uint8).ctypes.data % 4096 == 0 for view in kept)
    assert not is_aligned(kept[0], 1)


@pytest.mark.gpu
def test_buffers_of_a_gpus_pool_are_pinned():
    pool = make_pool("cuda", torch.float32)
    payload = pool.read_block(3)
    assert torch.from_numpy(np.frombuffer(payload, np.uint8)).is_pinned()
