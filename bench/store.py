#!/usr/bin/env python3
"""The store's bandwidth and look-ups beside what the disk and the memory give, in one run, passes alternating.

    python bench/store.py --folder /scratch/me --gib 1 --rounds 3

Blocks have the shape of an 8 B model's: 8 KV heads, 32 layers, 64 tokens, 8 MiB. Reads are cold: the page cache is dropped for
the files read. `raw` is one sequential stream, written with fsync, read with O_DIRECT, verified by nobody.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hpckv.quantity import ByteSize
from hpckv.store import BlockGeometry, Identity, Namespace, StoreConfig, open_store
from hpckv.store.block import tile_digests
from hpckv.store.block_index import BlockIndex, Entries
from hpckv.store.catalog import Catalog
from hpckv.store.direct_io import ALIGNMENT, aligned_buffer
from hpckv.store.durable import publish
from hpckv.store.fetch import Fetch
from hpckv.store.index_file import IndexedSegment, IndexFile
from hpckv.store.layout import StoreLayout
from hpckv.store.node_index import NodeIndex
from hpckv.store.segment import SegmentContext, StoredBlock

GEOMETRY = BlockGeometry(num_kv_heads=8, num_layers=32, block_tokens=64, head_dim=128, item_bytes=2)
NAMESPACE = Namespace(Identity(weights="bench", config={}), {"dtype": "bfloat16"})
READ_AHEAD = 8
"""Prefixes on their way at once, as in the scheduler."""
CHUNK = 8 * 1024**2


def blocks(count: int) -> list[StoredBlock]:
    """Distinct keys over a few payloads of random bytes, page-aligned as an engine's copies are."""
    payloads = [aligned_buffer(GEOMETRY.block_bytes) for _ in range(8)]
    for n, payload in enumerate(payloads):
        payload[:] = np.random.default_rng(n).bytes(GEOMETRY.block_bytes)
    return [
        StoredBlock(n.to_bytes(8, "big").rjust(32, b"k")[::-1], bytes(32), 64 * n, payloads[n % 8])
        for n in range(count)
    ]


def open_tiers(folder: Path, write: str):
    config = StoreConfig(shared=str(folder), write=write, host_size=ByteSize(0), segment_size=ByteSize(256 * 1024**2))
    return open_store(config, NAMESPACE, GEOMETRY)


def write_store(folder: Path, given: list[StoredBlock]) -> None:
    """Durable when it returns; waits where a run would drop."""
    tiers = open_tiers(folder, "all")
    for block in given:
        while not tiers.save(block, keeps_payload=True):
            time.sleep(0.001)
    tiers.close()


def read_store(folder: Path, given: list[StoredBlock]) -> None:
    """As the engine does: prefixes of a few blocks, several ahead."""
    tiers = open_tiers(folder, "off")
    waiting = [[b.key for b in given[i : i + 4]] for i in range(0, len(given), 4)]
    fetches: deque[Fetch] = deque()
    while waiting or fetches:
        while waiting and len(fetches) < READ_AHEAD:
            fetches.append(tiers.fetch(waiting.pop(0)))
        fetch = fetches.popleft()
        while not fetch.is_done:
            fetch.arrival.clear()
            fetch.arrival.wait(0.05)
        assert len(fetch.loaded) == len(fetch.jobs)
    tiers.close()


def write_raw(folder: Path, given: list[StoredBlock]) -> None:
    fd = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for block in given:
        os.write(fd, block.payload)
    os.fsync(fd)
    os.close(fd)


def read_raw(folder: Path, given: list[StoredBlock]) -> None:
    try:
        fd = os.open(folder / "raw", os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a filesystem in memory
        fd = os.open(folder / "raw", os.O_RDONLY)
    buffer = mmap.mmap(-1, CHUNK)  # page-aligned, as O_DIRECT wants it
    at = 0
    while got := os.preadv(fd, [buffer], at):
        at += got
    os.close(fd)


def drop_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bandwidth(where: Path, gib: float, rounds: int, table: Table, name: str) -> None:
    given = blocks(int(gib * 1024**3 / GEOMETRY.block_bytes))
    steps = {"write": (write_store, write_raw), "read": (read_store, read_raw)}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=where) as folder:
            for step, (ours, raw) in steps.items():
                for kind, work in (("store", ours), ("raw", raw)):
                    drop_cache(Path(folder))
                    target = Path(folder) / "kv" if kind == "store" else Path(folder)
                    found.setdefault((step, kind), []).append(timed(lambda w=work, t=target: w(t, given)))
    for step in steps:
        raw_s = statistics.median(wall for wall, _ in found[step, "raw"])
        for kind in ("store", "raw"):
            wall = statistics.median(wall for wall, _ in found[step, kind])
            cpu = statistics.median(cpu for _, cpu in found[step, kind])
            every = " ".join(f"{w:.2f}" for w, _ in found[step, kind])
            table.add_row(name, step, kind, f"{gib / wall:.2f}", f"{raw_s / wall:.2f}", f"{cpu / gib:.2f}", every)


def parts(folder: Path, table: Table) -> None:
    """CPU seconds a GiB of what a verified read is made of, each alone, in one thread."""
    size, count = GEOMETRY.block_bytes, 128
    key = bytes(32)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        write_raw(Path(place), blocks(count))
        fd = os.open(Path(place) / "raw", os.O_RDONLY)
        direct_fd = os.open(Path(place) / "raw", os.O_RDONLY | os.O_DIRECT)
        buffer = aligned_buffer(size)
        buffer[:] = np.random.default_rng(0).bytes(size)

        def touch() -> None:
            kept = [aligned_buffer(size) for _ in range(count)]
            for memory in kept:
                np.frombuffer(memory, np.uint8)[::ALIGNMENT] = 1

        def digest() -> None:
            for _ in range(count):
                tile_digests(key, key, GEOMETRY.tiles, buffer)

        def read(from_fd: int) -> None:
            for number in range(count):
                os.preadv(from_fd, [buffer], number * size)

        works = {
            "digests of 128 KiB tiles": digest,
            "read past the page cache": lambda: read(direct_fd),
            "read through it, cold": lambda: read(fd),
            "read from it": lambda: read(fd),
            "first touch of memory": touch,
        }
        for name, work in works.items():
            if name.endswith("cold"):
                drop_cache(Path(place))
            wall, cpu = timed(work)
            table.add_row(name, f"{wall:.2f}", f"{cpu:.2f}")
        os.close(fd)
        os.close(direct_fd)


def lookups(num_blocks: int, table: Table) -> None:
    """An index of so many blocks: memory, and microseconds a key."""
    rng = np.random.default_rng(0)
    prefixes = rng.integers(0, 2**64, num_blocks, dtype=np.uint64)
    number = (np.arange(num_blocks) // 4096).astype(np.uint64)
    index = BlockIndex()
    index.add(
        Entries(prefixes, (number << np.uint64(32)) | np.arange(num_blocks, dtype=np.uint64) % np.uint64(4096)).sort()
    )
    index.present([bytes(32)])
    for batch in (16, 128, 1024):
        keys = [int(p).to_bytes(8, "little") + bytes(24) for p in rng.choice(prefixes, batch)]
        walls = [timed(lambda keys=keys: index.present(keys))[0] for _ in range(200)]
        table.add_row(
            f"{num_blocks:,}",
            str(batch),
            f"{statistics.median(walls) / batch * 1e6:.2f}",
            f"{index.num_bytes / num_blocks:.0f}",
        )


def warm_start(folder: Path, num_blocks: int, table: Table) -> None:
    """What a process pays that meets a store of so many blocks: the first of a node, and one that finds the first's view."""
    context = SegmentContext(bytes(32), 0, bytes(32), b"{}", GEOMETRY)
    per_segment = 2000
    rng = np.random.default_rng(0)
    prefixes = np.sort(rng.integers(0, 2**64, num_blocks, dtype=np.uint64))
    numbers = rng.integers(0, num_blocks // per_segment, num_blocks).astype(np.uint64)
    entries = Entries(prefixes, numbers << np.uint64(32))
    names = [rng.bytes(16) for _ in range(num_blocks // per_segment)]
    file = IndexFile([IndexedSegment(name, per_segment, GEOMETRY.box) for name in names], entries)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        layout = StoreLayout(Path(place) / "kv")
        namespace = layout.namespace_name(context.namespace, 0)
        segments, indexes = layout.segments(os.getuid(), namespace), layout.indexes(os.getuid(), namespace)
        segments.mkdir(parents=True)
        indexes.mkdir(parents=True)
        for name in names:
            (segments / f"{name.hex()}.h5").touch()
        publish(indexes / f"{bytes(16).hex()}.idx", file.build(context))
        catalogs = [Catalog(layout, context, node=NodeIndex(Path(place) / "node")) for _ in range(2)]
        for who, catalog in zip(("first of a node", "another"), catalogs, strict=True):
            drop_cache(indexes)
            wall, cpu = timed(catalog.refresh)
            assert len(catalog) == num_blocks
            table.add_row(f"{num_blocks:,}", who, f"{wall:.2f}", f"{cpu:.2f}")


def main() -> None:
    """Print all tables."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--folder", type=Path, default=Path("runs"), help="on the disk or filesystem to measure")
    ap.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a filesystem in memory")
    ap.add_argument("--gib", type=float, default=1.0)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--blocks", type=int, default=10_000_000, help="in the index")
    args = ap.parse_args()
    args.folder.mkdir(exist_ok=True)
    columns = ("where", "step", "who", "GiB/s", "of raw", "CPU s a GiB", "all s")
    table = Table(*columns, title="Bandwidth", title_justify="left")
    bandwidth(args.folder, args.gib, args.rounds, table, "disk")
    if shutil.disk_usage(args.memory).free > 4 * args.gib * 1024**3:
        bandwidth(args.memory, args.gib, args.rounds, table, "memory")
    console = Console(width=110, highlight=False)
    console.print(table)
    alone = Table("part", "s a GiB", "CPU s a GiB", title="Alone, in one thread", title_justify="left")
    parts(args.folder, alone)
    console.print(alone)
    found = Table("blocks", "keys at once", "us a key", "bytes a block", title="Look-up", title_justify="left")
    lookups(args.blocks, found)
    console.print(found)
    starts = Table("blocks", "process", "s", "CPU s", title="Start with an indexed store", title_justify="left")
    warm_start(args.folder, args.blocks, starts)
    console.print(starts)


if __name__ == "__main__":
    main()
