"""Keys: golden vectors from the definition itself, chaining, and what a key depends on."""

from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from hpckv.store.block import (
    GOLDEN_KEYS,
    ROOT_KEY,
    BlockGeometry,
    block_key,
    check_golden_vector,
    prefix_keys,
    tile_digests,
)

EPOCH = bytes(range(32))
IDENTITY = b"\x11" * 32


def test_golden_vectors_follow_from_the_definition():
    check_golden_vector()
    first = blake3(
        IDENTITY + bytes(32) + bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0x70, 0x11, 1, 0]), key=EPOCH
    ).digest()
    assert first.hex() == GOLDEN_KEYS[0]
    second = blake3(
        IDENTITY + first + bytes([5, 0, 0, 0, 6, 0, 0, 0, 7, 0, 0, 0, 255, 255, 255, 255]), key=EPOCH
    ).digest()
    assert second.hex() == GOLDEN_KEYS[1]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 9))
def test_prefix_keys_chain_block_by_block(tokens, block_tokens):
    keys = prefix_keys(EPOCH, IDENTITY, tokens, block_tokens)
    assert len(keys) == len(tokens) // block_tokens
    parent = ROOT_KEY
    for number, key in enumerate(keys):
        assert key == block_key(EPOCH, IDENTITY, parent, tokens[number * block_tokens : (number + 1) * block_tokens])
        parent = key
    half = len(keys) // 2
    if half:
        rest = prefix_keys(EPOCH, IDENTITY, tokens, block_tokens, parent=keys[half - 1], start=half * block_tokens)
        assert rest == keys[half:]


def test_a_key_depends_on_secret_identity_parent_tokens_and_extra():
    base = block_key(EPOCH, IDENTITY, ROOT_KEY, [1, 2])
    others = {
        block_key(b"x" * 32, IDENTITY, ROOT_KEY, [1, 2]),
        block_key(EPOCH, b"y" * 32, ROOT_KEY, [1, 2]),
        block_key(EPOCH, IDENTITY, b"z" * 32, [1, 2]),
        block_key(EPOCH, IDENTITY, ROOT_KEY, [1, 3]),
        block_key(EPOCH, IDENTITY, ROOT_KEY, [1, 2], b"salt"),
    }
    assert len(others) == 5
    assert base not in others


def test_tiles_cover_a_block_exactly_once_in_order():
    geometry = BlockGeometry(num_kv_heads=3, num_layers=5, block_tokens=4, head_dim=6, item_bytes=2, layers_per_tile=2)
    assert geometry.layer_bytes == 96
    spans = [tile.span for tile in geometry.tiles]
    assert [(s.start, s.stop) for s in spans[:4]] == [(0, 192), (192, 384), (384, 480), (480, 672)]
    assert spans[-1].stop == geometry.block_bytes == 3 * 5 * 96


def test_a_tile_digest_is_bound_to_key_and_place():
    geometry = BlockGeometry(num_kv_heads=2, num_layers=1, block_tokens=2, head_dim=2, item_bytes=2)
    payload = memoryview(bytes(geometry.block_bytes))
    digests = tile_digests(EPOCH, b"a" * 32, geometry.tiles, payload)
    assert digests[:16] != digests[16:]
    assert digests[16:] == tile_digests(EPOCH, b"a" * 32, geometry.tiles[1:], payload[len(payload) // 2 :])
    assert digests != tile_digests(EPOCH, b"b" * 32, geometry.tiles, payload)
