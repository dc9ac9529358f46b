"""The identity matrix: change one thing that decides a block's bytes, or none of them, and see what the store answers.

Each row writes a prefix with one setting, opens the same store with one thing changed, and asks for the prefix: a miss, or a
hit with the right bytes. Engines that leave something out of their keys fail rows of it.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpckv.quantity import ByteSize
from hpckv.store.block import BlockGeometry, Box, prefix_keys
from hpckv.store.config import StoreConfig
from hpckv.store.identity import Identity, Namespace, weights_digest
from hpckv.store.opening import open_store
from hpckv.store.root import StoreRoot
from hpckv.store.segment import StoredBlock
from hpckv.store.tiered_store import TieredStore

_HEADS, _LAYERS, _NUM_TOKENS = 4, 6, 192
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": _HEADS,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "vocab_size": 128256,
    "_name_or_path": "models/a",
}
MISS, RIGHT, WRONG = "miss", "hit, right bytes", "hit, WRONG bytes"
_WHOLE: Box = (0, _HEADS, 0, _LAYERS)


@dataclass(frozen=True)
class Setting:
    """What an engine says of itself when it opens a store, and the boxes its ranks own."""

    weights: bytes = bytes(4096)
    """Content of its one weight file."""
    config: dict[str, Any] = field(default_factory=lambda: dict(_CONFIG))
    quantization: str = "none"
    adapter: str = "none"
    dtype: str = "bfloat16"
    block_tokens: int = 16
    layers_per_tile: int = 4
    numerics: str = "fast"
    arithmetic: str = "sm_90"
    boxes: Sequence[Box] = (_WHOLE,)
    store: dict[str, Any] = field(default_factory=dict)
    """Settings of `store:`."""

    def namespace(self, folder: Path) -> Namespace:
        file = folder / "model.safetensors"
        file.write_bytes(self.weights)
        identity = Identity(weights_digest([file]), self.config, self.quantization, self.adapter)
        representation: dict[str, object] = {
            "dtype": self.dtype,
            "block_tokens": self.block_tokens,
            "layers_per_tile": self.layers_per_tile,
            "numerics": self.numerics,
        }
        if self.numerics == "strict":
            representation["arithmetic"] = self.arithmetic
        return Namespace(identity, representation)

    def geometry(self, box: Box) -> BlockGeometry:
        item = 4 if self.dtype == "float32" else 2
        whole = BlockGeometry(_HEADS, _LAYERS, self.block_tokens, 8, item, self.layers_per_tile)
        return whole.with_box(*box)


@dataclass(frozen=True)
class Row:
    """One change and what must come of it."""

    change: str
    expected: str
    """`RIGHT` or `MISS`."""
    before: Setting = Setting()
    after: Setting = Setting()
    rotates: bool = False


def _tensor_parallel(ranks: int) -> list[Box]:
    heads = max(1, _HEADS // ranks)  # more ranks than heads: replicated
    return [(h, h + heads, 0, _LAYERS) for h in range(0, _HEADS, heads)]


def _pipeline_parallel(stages: int, boxes: Sequence[Box] = (_WHOLE,)) -> list[Box]:
    edges = [_LAYERS * n // stages for n in range(stages + 1)]
    return [(h0, h1, l0, l1) for h0, h1, *_ in boxes for l0, l1 in itertools.pairwise(edges)]


def rows() -> list[Row]:
    """The matrix."""
    plain, strict = Setting(), Setting(numerics="strict")
    both = _pipeline_parallel(2, _tensor_parallel(2))

    def config(**changes: object) -> Setting:
        return Setting(config={**_CONFIG, **changes})

    return [
        Row("nothing", RIGHT),
        Row("the folder's name", RIGHT, after=config(_name_or_path="models/b")),
        Row("weights", MISS, after=Setting(weights=b"\1" * 4096)),
        Row("one bit of one tensor", MISS, after=Setting(weights=bytes(4095) + b"\1")),
        Row("RoPE base", MISS, after=config(rope_theta=10000.0)),
        Row("RoPE scaling", MISS, after=config(rope_scaling={"rope_type": "yarn", "factor": 4.0})),
        Row("a config field nobody knows", MISS, after=config(attention_temperature=0.9)),
        Row("vocabulary", MISS, after=config(vocab_size=128257)),
        Row("dtype", MISS, after=Setting(dtype="float32", store={"bridging": "off"})),
        Row("dtype, bridged", RIGHT, after=Setting(dtype="float16")),
        Row("dtype, bridged the other way, which rounds", MISS, Setting(dtype="float16"), plain),
        Row("quantisation", MISS, after=Setting(quantization="fp8-rowwise")),
        Row("adapter", MISS, after=Setting(adapter="lora-1")),
        Row("block size", MISS, after=Setting(block_tokens=32)),
        Row("tile grid", MISS, after=Setting(layers_per_tile=2)),
        Row("salt (a private run)", MISS, after=Setting(store={"private": True})),
        Row("key epoch", MISS, rotates=True),
        Row("numerics mode", MISS, after=strict),
        Row("GPU class, fast", RIGHT, after=Setting(arithmetic="sm_70")),
        Row("GPU class, strict", MISS, strict, replace(strict, arithmetic="sm_70")),
        Row("TP 1 to 2", RIGHT, after=Setting(boxes=_tensor_parallel(2))),
        Row("TP 4 to 1", RIGHT, Setting(boxes=_tensor_parallel(4)), plain),
        Row(
            "TP 2 to 8, heads replicated", RIGHT, Setting(boxes=_tensor_parallel(2)), Setting(boxes=_tensor_parallel(8))
        ),
        Row("PP 1 to 3", RIGHT, after=Setting(boxes=_pipeline_parallel(3))),
        Row("PP 3 to 2", RIGHT, Setting(boxes=_pipeline_parallel(3)), Setting(boxes=_pipeline_parallel(2))),
        Row("TP x PP 2x2 to 1x1", RIGHT, Setting(boxes=both), plain),
        Row(
            "TP x PP 2x2 to 4x3", RIGHT, Setting(boxes=both), Setting(boxes=_pipeline_parallel(3, _tensor_parallel(4)))
        ),
        Row("three of four ranks' parts", MISS, Setting(boxes=both[:3]), plain),
    ]


def check_rows() -> Iterator[tuple[Row, str]]:
    """Every row with what came of it, each in a store of its own in a temporary folder."""
    for row in rows():
        with tempfile.TemporaryDirectory(prefix="hpckv-identity-") as folder:
            yield row, _outcome(row, Path(folder))


def _outcome(row: Row, folder: Path) -> str:
    values = np.random.default_rng(7).standard_normal((_NUM_TOKENS, _HEADS, _LAYERS, 2, 8)).astype(np.float32)
    values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)  # what bfloat16 can hold: right in every dtype
    for box in row.before.boxes:
        store = _open(row.before, folder, box)
        for number, key in enumerate(_keys(row.before, store)):
            payload = _payload(row.before, values, number, box)
            store.save(StoredBlock(key, bytes(32), number * row.before.block_tokens, payload))
        store.close()
    if row.rotates:
        StoreRoot.open(folder / "kv").rotate()
    outcomes = set()
    for box in row.after.boxes:
        store = _open(row.after, folder, box)
        keys = _keys(row.after, store)
        if store.match(keys) == 0:
            outcomes.add(MISS)
        for number, key in enumerate(keys if store.match(keys) else ()):
            loaded = store.load(StoredBlock(key, bytes(32), 0, b""))
            wanted = _payload(row.after, values, number, box)
            outcomes.add(MISS if loaded is None else RIGHT if bytes(loaded.payload) == wanted else WRONG)
        store.close()
    return WRONG if WRONG in outcomes else MISS if MISS in outcomes else RIGHT


def _open(setting: Setting, folder: Path, box: Box) -> TieredStore:
    given: dict[str, Any] = {"shared": str(folder / "kv"), "write": "all", "host_size": ByteSize(0), **setting.store}
    return open_store(StoreConfig(**given), setting.namespace(folder), setting.geometry(box))


def _keys(setting: Setting, store: TieredStore) -> list[bytes]:
    return prefix_keys(store.epoch_key, store.identity, range(_NUM_TOKENS), setting.block_tokens)


def _payload(setting: Setting, values: np.ndarray, number: int, box: Box) -> bytes:
    h0, h1, l0, l1 = box
    tokens = values[number * setting.block_tokens : (number + 1) * setting.block_tokens]
    block = np.ascontiguousarray(tokens[:, h0:h1, l0:l1].transpose(1, 2, 3, 0, 4))
    if setting.dtype == "bfloat16":
        return (block.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return block.astype(setting.dtype).tobytes()
