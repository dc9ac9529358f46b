"""A block's key and its shape in bytes.

The key names a prefix: it is chained over everything before it and keyed with the store's secret, so that nobody
without the secret can test guessed prompts against names (`docs/store-format.md`, 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from blake3 import blake3
from xxhash import xxh3_128_digest

KEY_BYTES = 32
DIGEST_BYTES = 16
Box = tuple[int, int, int, int]
"""A part of every block: KV heads [h0, h1) x layers [l0, l1) of the model."""

_TILES = b"tiles"
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
class Tile:
    """One KV head x layers [first_layer, end_layer) of a block: the unit of checksum and of the smallest read."""

    head: int
    first_layer: int
    end_layer: int
    span: slice
    """Its bytes in the payload of the box it was cut from."""

    @property
    def place(self) -> int:
        """Where it lies in the model, as 64 bits."""
        return self.head << 32 | self.first_layer << 16 | self.end_layer


def tile_digests(epoch_key: bytes, key: bytes, tiles: Sequence[Tile], data: memoryview) -> bytes:
    """The digests of consecutive tiles of a block, one after another; `data` are their bytes.

    XXH3-128 of a tile's bytes, seeded with its place, masked with the keyed BLAKE3-128 of the block's key. What happens to
    bytes by accident XXH3 sees as surely as BLAKE3 does, at the speed of memory; who could choose bytes to deceive it
    holds the epoch key and need not.
    """
    start = tiles[0].span.start
    bare = [xxh3_128_digest(data[t.span.start - start : t.span.stop - start], seed=t.place) for t in tiles]
    mask = blake3(_TILES + key, key=epoch_key).digest(DIGEST_BYTES)
    return bytes(np.frombuffer(b"".join(bare), np.uint8).reshape(-1, DIGEST_BYTES) ^ np.frombuffer(mask, np.uint8))


@dataclass(frozen=True)
class BlockGeometry:
    """The bytes of one block, or of the box of it that one rank owns: KV head, then layer, then K|V, then token, then dim.

    The box is KV heads [first_head, first_head + num_kv_heads) x layers [first_layer, first_layer + num_layers) of the
    model. Tiles are cut on the model's own grid of `layers_per_tile` layers, so boxes of every topology agree on them
    except where a box's edge cuts one in two.
    """

    num_kv_heads: int
    num_layers: int
    block_tokens: int
    head_dim: int
    item_bytes: int
    layers_per_tile: int = 4
    first_head: int = 0
    first_layer: int = 0

    @property
    def layer_bytes(self) -> int:
        """One KV head of one layer: K and V of all tokens."""
        return 2 * self.block_tokens * self.head_dim * self.item_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_kv_heads * self.num_layers * self.layer_bytes

    @property
    def box(self) -> Box:
        return (
            self.first_head,
            self.first_head + self.num_kv_heads,
            self.first_layer,
            self.first_layer + self.num_layers,
        )

    def with_box(self, first_head: int, end_head: int, first_layer: int, end_layer: int) -> BlockGeometry:
        """The same blocks, cut to another box."""
        return replace(
            self,
            num_kv_heads=end_head - first_head,
            num_layers=end_layer - first_layer,
            first_head=first_head,
            first_layer=first_layer,
        )

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """Tiles in payload order."""
        first_head, end_head, first_layer, end_layer = self.box
        out, at = [], 0
        for head in range(first_head, end_head):
            layer = first_layer
            while layer < end_layer:
                end = min(end_layer, (layer // self.layers_per_tile + 1) * self.layers_per_tile)
                size = (end - layer) * self.layer_bytes
                out.append(Tile(head, layer, end, slice(at, at + size)))
                layer, at = end, at + size
        return tuple(out)

    def heads_span(self, part: BlockGeometry) -> slice:
        """Where the KV heads of `part`, a box with the same layers, lie in this box's payload: always one run of bytes."""
        assert part.box[2:] == self.box[2:]
        size = self.num_layers * self.layer_bytes
        first = (part.first_head - self.first_head) * size
        return slice(first, first + part.num_kv_heads * size)

    def span(self, head: int, first_layer: int, end_layer: int) -> slice:
        """Where layers [first_layer, end_layer) of a KV head lie in this box's payload: always one run of bytes."""
        at = ((head - self.first_head) * self.num_layers + first_layer - self.first_layer) * self.layer_bytes
        return slice(at, at + (end_layer - first_layer) * self.layer_bytes)
