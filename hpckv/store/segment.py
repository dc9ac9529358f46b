"""A segment: one sealed, immutable file of many blocks. It is HDF5 followed by a trailer of our own.

libhdf5 builds the image in memory and never touches the shared file; readers parse only the trailer and the
tables it points to, bounds-checked and authenticated, and `pread` blocks at known offsets (`docs/store-format.md`, 3).
The HDF5 part is there for people and other programs: `h5dump`, `h5ls` and h5py open the file as it is.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from blake3 import blake3

from hpckv.store.block import DIGEST_BYTES, KEY_BYTES, BlockGeometry

MAGIC = b"HPCKVSEG"
FORMAT_VERSION = 1
TRAILER_BYTES = 512
ALIGNMENT = 4096
_FIELDS = struct.Struct("<8sIIQIIIIIIIIIIIIQQQQQ32s32s")
_MAC_BYTES = 32


class SegmentError(Exception):
    """This file cannot be used as a segment: torn, foreign, damaged or unsafe. For a reader it is a miss."""


@dataclass(frozen=True)
class StoredBlock:
    """One block on its way into a segment."""

    key: bytes
    parent: bytes
    position: int
    payload: bytes | bytearray | memoryview


@dataclass(frozen=True)
class SegmentContext:
    """What every segment of a namespace has in common."""

    namespace: bytes
    namespace_json: bytes
    geometry: BlockGeometry
    epoch: int
    epoch_key: bytes


def build_segment(context: SegmentContext, blocks: Sequence[StoredBlock]) -> bytearray:
    """The whole file in memory: HDF5 image and trailer."""
    geometry, count = context.geometry, len(blocks)
    tables = {
        "keys": np.frombuffer(b"".join(b.key for b in blocks), np.uint8).reshape(count, KEY_BYTES),
        "parents": np.frombuffer(b"".join(b.parent for b in blocks), np.uint8).reshape(count, KEY_BYTES),
        "positions": np.array([b.position for b in blocks], dtype="<u8"),
        "digests": np.frombuffer(
            b"".join(geometry.digests(context.epoch_key, b.key, memoryview(b.payload).cast("B")) for b in blocks),
            np.uint8,
        ).reshape(count, len(geometry.tiles), DIGEST_BYTES),
    }
    image, offsets = _hdf5_image(context, tables, count)
    for name, table in tables.items():
        _place(image, offsets[name], table.tobytes())
    for row, block in enumerate(blocks):
        _place(image, offsets["kv"] + row * geometry.block_bytes, block.payload)
    return image + _trailer(context, tables, offsets, count, len(image))


def _place(image: bytearray, at: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data).cast("B")
    image[at : at + len(view)] = view


def _hdf5_image(context: SegmentContext, tables: dict[str, np.ndarray], count: int) -> tuple[bytearray, dict[str, int]]:
    """An HDF5 file in memory with every dataset allocated, and where each begins. Payloads are filled in later."""
    geometry = context.geometry
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fapl_core(block_size=1024 * 1024, backing_store=False)
    access.set_libver_bounds(h5py.h5f.LIBVER_LATEST, h5py.h5f.LIBVER_LATEST)
    access.set_alignment(ALIGNMENT, ALIGNMENT)
    file = h5py.File(h5py.h5f.create(b"segment", h5py.h5f.ACC_EXCL, fapl=access))
    shapes = {name: (table.shape, table.dtype) for name, table in tables.items()}
    shapes["kv"] = ((count, geometry.block_bytes), np.dtype(np.uint8))
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    offsets = {}
    for name, (shape, dtype) in shapes.items():
        space, kind = h5py.h5s.create_simple(shape), h5py.h5t.py_create(dtype)
        dataset = h5py.h5d.create(file.id, name.encode(), kind, space, dcpl=layout)
        offsets[name] = dataset.get_offset()
    file["box"] = np.array([0, geometry.num_kv_heads, 0, geometry.num_layers], dtype="<u4")
    file["scales"] = np.zeros((count, 0), dtype="<f4")
    file.attrs["format"] = "hpckv segment"
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["namespace"] = context.namespace_json.decode()
    file.attrs["kv_order"] = "kv_head, layer, key|value, token, dim"
    file.attrs["kv_shape"] = [geometry.num_kv_heads, geometry.num_layers, 2, geometry.block_tokens, geometry.head_dim]
    file.flush()
    image = bytearray(file.id.get_file_image())
    file.close()
    return image, offsets


def _trailer(
    context: SegmentContext, tables: dict[str, np.ndarray], offsets: dict[str, int], count: int, image_bytes: int
) -> bytes:
    geometry = context.geometry
    fields = _FIELDS.pack(
        MAGIC,
        FORMAT_VERSION,
        TRAILER_BYTES,
        image_bytes + TRAILER_BYTES,
        count,
        geometry.block_tokens,
        geometry.head_dim,
        geometry.item_bytes,
        geometry.layers_per_tile,
        0,
        geometry.num_kv_heads,
        0,
        geometry.num_layers,
        os.getuid(),
        context.epoch,
        0,
        *(offsets[name] for name in ("keys", "parents", "positions", "digests", "kv")),
        context.namespace,
        _tables_digest(context.epoch_key, *(tables[n].tobytes() for n in ("keys", "parents", "positions", "digests"))),
    )
    body = fields.ljust(TRAILER_BYTES - _MAC_BYTES, b"\0")
    return body + blake3(body, key=context.epoch_key).digest()


def _tables_digest(epoch_key: bytes, *tables: bytes) -> bytes:
    hasher = blake3(key=epoch_key)
    for table in tables:
        hasher.update(table)
    return hasher.digest()


class Segment:
    """An open segment file, authenticated. Its blocks are verified one by one as they are read."""

    def __init__(self, path: Path, context: SegmentContext, trusted_uids: frozenset[int] | None = None) -> None:
        """Open and check; raises `SegmentError` or `OSError`. `trusted_uids` None trusts every owner."""
        self.path = path
        self._context = context
        # O_NONBLOCK: somebody's fifo must not stop us; O_NOFOLLOW: nor a link lead us out of the store.
        self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._check_owner(trusted_uids)
            self._read_trailer()
        except BaseException:
            self.close()
            raise

    def _check_owner(self, trusted_uids: frozenset[int] | None) -> None:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise SegmentError("not a regular file")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise SegmentError("writable by others than its owner")
        if trusted_uids is not None and status.st_uid not in trusted_uids:
            raise SegmentError(f"owned by uid {status.st_uid}, who is not trusted")
        self.owner, self.file_bytes = status.st_uid, status.st_size

    def _read_trailer(self) -> None:
        context, geometry = self._context, self._context.geometry
        if self.file_bytes < TRAILER_BYTES:
            raise SegmentError("too short")
        trailer = self._pread(TRAILER_BYTES, self.file_bytes - TRAILER_BYTES)
        body, mac = trailer[:-_MAC_BYTES], trailer[-_MAC_BYTES:]
        if not body.startswith(MAGIC):
            raise SegmentError("no segment, or torn: its trailer is missing")
        (
            _,
            version,
            _,
            size,
            count,
            tokens,
            dim,
            item,
            per_tile,
            *box,
            uid,
            epoch,
            _,
            o_keys,
            o_parents,
            o_positions,
            o_digests,
            o_kv,
            namespace,
            tables,
        ) = (  # fmt: skip
            _FIELDS.unpack_from(body)
        )
        if version != FORMAT_VERSION:
            raise SegmentError(f"format version {version}, this program reads {FORMAT_VERSION}")
        if blake3(body, key=context.epoch_key).digest() != mac:
            raise SegmentError("its trailer does not verify with this store's key")
        if size != self.file_bytes or namespace != context.namespace or epoch != context.epoch or uid != self.owner:
            raise SegmentError("its trailer does not belong to this file, namespace or epoch")
        described = BlockGeometry(box[1] - box[0], box[3] - box[2], tokens, dim, item, per_tile)
        if described != geometry or (box[0], box[2]) != (0, 0):
            raise SegmentError(f"its blocks have another shape ({described})")
        tile_bytes = len(geometry.tiles) * DIGEST_BYTES
        wanted = [(o_keys, KEY_BYTES), (o_parents, KEY_BYTES), (o_positions, 8), (o_digests, tile_bytes)]
        wanted.append((o_kv, geometry.block_bytes))
        for offset, width in wanted:
            if offset + width * count > self.file_bytes - TRAILER_BYTES:
                raise SegmentError("its trailer points outside the file")
        parts = [self._pread(width * count, offset) for offset, width in wanted[:4]]
        if _tables_digest(context.epoch_key, *parts) != tables:
            raise SegmentError("its key table does not verify")
        keys, self._digests, self._kv_offset = parts[0], parts[3], o_kv
        self.keys = [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
        self.parents = [parts[1][i : i + KEY_BYTES] for i in range(0, len(parts[1]), KEY_BYTES)]
        self.positions = np.frombuffer(parts[2], dtype="<u8").tolist()

    def read(self, row: int, into: memoryview) -> None:
        """Read block `row` into a buffer of `block_bytes` and verify it there; raises `SegmentError` or `OSError`."""
        geometry = self._context.geometry
        at, done = self._kv_offset + row * geometry.block_bytes, 0
        while done < geometry.block_bytes:
            got = os.preadv(self._fd, [into[done:]], at + done)
            if got == 0:
                raise SegmentError("ends before its blocks do")
            done += got
        width = len(geometry.tiles) * DIGEST_BYTES
        found = geometry.digests(self._context.epoch_key, self.keys[row], into)
        if found != self._digests[row * width : (row + 1) * width]:
            raise SegmentError(f"block {row} does not verify")

    def close(self) -> None:
        """Give the descriptor back; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _pread(self, size: int, offset: int) -> bytes:
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise SegmentError("ends before its tables do")
        return data
