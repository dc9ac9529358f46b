"""A block's key and its shape in bytes.

The key names a prefix: it is chained over everything before it and keyed with the store's secret, so that nobody
without the secret can test guessed prompts against names (`docs/store-format.md`, 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

KEY_BYTES = 32
DIGEST_BYTES = 16
ROOT_KEY = bytes(KEY_BYTES)
"""Parent of a prompt's first block."""

GOLDEN_KEYS = (
    "4d9475aaaa2cb43f06c19626c62bbd8662c70718c90e72e2a342fc69ebfcc29b",
    "4598e84e37ea495db2b69a9aa5d934942b1b3aa8622ac99d13f186925b7e12ca",
)
"""Keys of tokens [1, 2, 3, 70000], [5, 6, 7, 2**32 - 1] under epoch key 00..1f and identity 11..11; checked at every start."""


def block_key(
    epoch_key: bytes, identity_digest: bytes, parent: bytes, token_ids: Sequence[int], extra: bytes = b""
) -> bytes:
    """BLAKE3(key=epoch_key; identity || parent || token ids as little-endian u32 || extra), 32 bytes."""
    tokens = np.asarray(token_ids, dtype="<u4").tobytes()
    return blake3(identity_digest + parent + tokens + extra, key=epoch_key).digest()


def prefix_keys(
    epoch_key: bytes,
    identity_digest: bytes,
    token_ids: Sequence[int],
    block_tokens: int,
    *,
    parent: bytes = ROOT_KEY,
    start: int = 0,
) -> list[bytes]:
    """Keys of all full blocks of `token_ids` from position `start` (a multiple of `block_tokens`) on."""
    keys = []
    tokens = np.asarray(token_ids, dtype="<u4").tobytes()
    step = 4 * block_tokens
    for at in range(4 * start, len(tokens) - step + 1, step):
        parent = blake3(identity_digest + parent + tokens[at : at + step], key=epoch_key).digest()
        keys.append(parent)
    return keys


def check_golden_vector() -> None:
    """Compute a known key; raises `AssertionError` if this build of the digest library disagrees with every other."""
    first, second = prefix_keys(bytes(range(32)), b"\x11" * 32, [1, 2, 3, 70000, 5, 6, 7, 4294967295], 4)
    assert (first.hex(), second.hex()) == GOLDEN_KEYS, "block keys of this build differ from the format's"


@dataclass(frozen=True)
class BlockGeometry:
    """The bytes of one block: KV head, then layer, then K|V, then token, then dim.

    A tile is one KV head x up to `layers_per_tile` layers: the unit of checksum and of the smallest read.
    """

    num_kv_heads: int
    num_layers: int
    block_tokens: int
    head_dim: int
    item_bytes: int
    layers_per_tile: int = 4

    @property
    def layer_bytes(self) -> int:
        """One KV head of one layer: K and V of all tokens."""
        return 2 * self.block_tokens * self.head_dim * self.item_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_kv_heads * self.num_layers * self.layer_bytes

    @property
    def tiles(self) -> list[slice]:
        """Byte ranges of a block's tiles, in payload order."""
        head_bytes = self.num_layers * self.layer_bytes
        step = self.layers_per_tile * self.layer_bytes
        return [
            slice(head * head_bytes + at, head * head_bytes + min(at + step, head_bytes))
            for head in range(self.num_kv_heads)
            for at in range(0, head_bytes, step)
        ]

    def digests(self, epoch_key: bytes, key: bytes, payload: memoryview) -> bytes:
        """Keyed BLAKE3-128 of every tile, bound to the block's key and the tile's place, one after another."""
        out = []
        for number, tile in enumerate(self.tiles):
            hasher = blake3(key + number.to_bytes(4, "little"), key=epoch_key)
            hasher.update(payload[tile])
            out.append(hasher.digest(DIGEST_BYTES))
        return b"".join(out)
