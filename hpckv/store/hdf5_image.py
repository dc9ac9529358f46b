"""The HDF5 part of a segment, made without a payload-sized buffer and without libhdf5 ever touching a file.

libhdf5 writes through a Python object that keeps what it writes in pages of memory. Datasets are allocated early and
never filled, so the payload's region stays a hole; the segment's writer puts the blocks there with its own calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import h5py
import numpy as np

ALIGNMENT = 4096


@dataclass(frozen=True)
class Hdf5Image:
    """An HDF5 file with a hole: `head`, then `hole_bytes` for somebody else to fill, then `tail`."""

    head: bytes
    hole_bytes: int
    tail: bytes
    offsets: Mapping[str, int]
    """Where each dataset's raw data begins; the hole is `offsets[hole]`."""

    @property
    def num_bytes(self) -> int:
        return len(self.head) + self.hole_bytes + len(self.tail)


def build_image(
    tables: Mapping[str, np.ndarray], hole: str, hole_shape: tuple[int, int], attributes: Mapping[str, object]
) -> Hdf5Image:
    """HDF5 with contiguous datasets `tables`, and a u8 dataset `hole` whose bytes are left out."""
    memory = _Memory()
    with h5py.File(memory, "w", libver="latest", alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT) as file:
        for name, value in attributes.items():
            file.attrs[name] = value
        offsets = {name: _dataset(file, name, table.shape, table.dtype, table) for name, table in tables.items()}
        offsets[hole] = _dataset(file, hole, hole_shape, np.dtype(np.uint8), None)
    hole_bytes = hole_shape[0] * hole_shape[1]
    start = offsets[hole]
    return Hdf5Image(memory.bytes(0, start), hole_bytes, memory.bytes(start + hole_bytes, memory.num_bytes), offsets)


def _dataset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype, data: np.ndarray | None) -> int:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    dataset = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, dcpl=layout)
    if data is not None and data.size:
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(data))
    return dataset.get_offset() or 0


class _Memory:
    """A seekable file of bytes that only keeps the pages somebody wrote to."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._pages: dict[int, bytearray] = {}
        self._at = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self.num_bytes)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        for page, start, part in self._parts(self._at, len(view)):
            kept = self._pages.setdefault(page, bytearray(ALIGNMENT))
            kept[start : start + part.stop - part.start] = view[part]
        self._at += len(view)
        self.num_bytes = max(self.num_bytes, self._at)
        return len(view)

    def read(self, size: int = -1) -> bytes:
        end = self.num_bytes if size < 0 else min(self.num_bytes, self._at + size)
        data = self.bytes(self._at, end)
        self._at += len(data)
        return data

    def readinto(self, into: memoryview) -> int:
        data = self.read(len(into))
        memoryview(into).cast("B")[: len(data)] = data
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self.num_bytes = self._at if size is None else size
        return self.num_bytes

    def flush(self) -> None:
        pass

    def bytes(self, start: int, end: int) -> bytes:
        """Bytes [start, end); zeros where nothing was written."""
        out = bytearray(max(0, end - start))
        for page, first, part in self._parts(start, len(out)):
            if page in self._pages:
                out[part] = self._pages[page][first : first + part.stop - part.start]
        return bytes(out)

    def _parts(self, at: int, size: int) -> list[tuple[int, int, slice]]:
        parts, done = [], 0
        while done < size:
            page, start = divmod(at + done, ALIGNMENT)
            step = min(size - done, ALIGNMENT - start)
            parts.append((page, start, slice(done, done + step)))
            done += step
        return parts
