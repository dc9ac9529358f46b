#!/usr/bin/env python3
"""One way to keep KV blocks on a disk, in one process: it does the step that stdin names and prints a JSON line about it.

    echo write | python bench/peer_stores.py hpckv --folder runs/store --gib 1

Started by `bench/store_peers.py`. Every writer begins with KV in memory that it must not keep, and ends when all of it is on the
disk. Every reader ends when all of it is in `pages`, memory that is there before and stands for an engine's. `copy_s` is the CPU
time of the last copy, into them, for those that read into memory of their own first.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

BLOCK_TOKENS, LAYERS, KV_HEADS, HEAD_DIM = 64, 32, 8, 128
TOKEN_BYTES = 2 * LAYERS * KV_HEADS * HEAD_DIM * 2
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES
CHUNK_TOKENS = 256
"""LMCache's default granule; safetensors files have it too."""
CHUNK_BYTES = CHUNK_TOKENS * TOKEN_BYTES
SOURCES = 8
_IN_FLIGHT = 4


def sources(size: int) -> list[np.ndarray]:
    """A few payloads of random bytes; block n has the content of number n modulo their count."""
    return [np.frombuffer(np.random.default_rng(n).bytes(size), np.uint8) for n in range(SOURCES)]


class Pages:
    """Where everything that is read ends: a ring of memory, touched before."""

    def __init__(self):
        self.memory = np.ones(SOURCES * CHUNK_BYTES, np.uint8)
        self.copy_s = 0.0
        self._at = 0

    def next(self, size: int) -> np.ndarray:
        """The next so many bytes of the ring, whose size is a multiple."""
        self._at = (self._at + size) % len(self.memory)
        self.last = self.memory[self._at : self._at + size]
        return self.last

    def copy(self, payload) -> None:
        """Copy a buffer of bytes, counted."""
        begun = time.thread_time()
        self.next(len(payload))[:] = payload
        self.copy_s += time.thread_time() - begun


def sync_files(folder: Path) -> None:
    """fsync of every file below and of the folder."""
    for path in (*folder.rglob("*"), folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


class Hpckv:
    """This project's shared tier, as the engine uses it: put to durable, and fetches of 1,024 tokens, several at once."""

    def __init__(self, folder: Path, num_bytes: int, pages: Pages):
        from hpckv.store import BlockGeometry, Identity, Namespace
        from hpckv.store.direct_io import BufferPool

        self.folder, self.pages = folder, pages
        self.geometry = BlockGeometry(KV_HEADS, LAYERS, BLOCK_TOKENS, HEAD_DIM, 2)
        self.namespace = Namespace(Identity(weights="bench", config={}), {"dtype": "bfloat16"})
        self.keys = [n.to_bytes(8, "big").rjust(32, b"k")[::-1] for n in range(num_bytes // BLOCK_BYTES)]
        self.sources = sources(BLOCK_BYTES)
        # As an engine's, made while weights are read; LMCache's memory is there before the clock starts too.
        self.buffers = BufferPool(BLOCK_BYTES)
        self.buffers.reserve()

    def _open(self, write: str):
        from hpckv.quantity import ByteSize
        from hpckv.store import StoreConfig, open_store

        config = StoreConfig(
            shared=str(self.folder), write=write, host_size=ByteSize(0), local="none", deadline_s=600, seal_s=600
        )
        return open_store(config, self.namespace, self.geometry, buffers=self.buffers)

    def write(self) -> dict:
        """From opening the store to the end of close(): durable, and the process's segments indexed."""
        from hpckv.store.segment import StoredBlock

        store = self._open("all")
        for number, key in enumerate(self.keys):
            payload = self.buffers.take()
            np.copyto(np.frombuffer(payload, np.uint8), self.sources[number % SOURCES])  # as out of an engine's pages
            block = StoredBlock(key, bytes(32), BLOCK_TOKENS * number, payload)
            while not store.save(block, keeps_payload=True):  # a run would drop the block instead
                time.sleep(0.02)
        store.flush()
        store.close()
        return {}

    def read(self) -> dict:
        """From opening the store, whose blocks another process wrote, to the last verified block."""
        store = self._open("off")
        seen = store.match(self.keys)
        step = 1024 // BLOCK_TOKENS
        prefixes = [self.keys[first : first + step] for first in range(0, len(self.keys), step)]
        fetches = [store.fetch(keys) for keys in prefixes[:_IN_FLIGHT]]
        loaded = 0
        for number in range(len(prefixes)):
            fetch = fetches[number]
            while not fetch.is_done:
                fetch.arrival.clear()
                if not fetch.is_done:
                    fetch.arrival.wait(0.05)
            if len(fetches) < len(prefixes):
                fetches.append(store.fetch(prefixes[len(fetches)]))
            loaded += len(fetch.loaded)
            for job in fetch.jobs:
                if job.loaded is not None:
                    self.pages.copy(np.frombuffer(job.loaded[1], np.uint8))
                job.loaded = None  # as the engine gives the memory back
        store.close()
        return {"seen": seen, "loaded": loaded, "of": len(self.keys)}

    def read_one_thread(self) -> dict:
        """Verified blocks one after another in this thread, from opening the store on; not copied any further."""
        store = self._open("off")
        loaded = 0
        for key in self.keys:
            payload = store.tiers[-1].get(key)
            loaded += payload is not None
        self.pages.copy(np.frombuffer(payload, np.uint8))
        store.close()
        return {"seen": loaded, "loaded": loaded, "of": len(self.keys)}

    def check(self) -> None:
        """What came last is what was written last."""
        assert np.array_equal(self.pages.last, self.sources[(len(self.keys) - 1) % SOURCES])


class LMCache:
    """LMCache's LocalDiskBackend by its own put and get; its pool of memory was made before."""

    is_direct = False

    def __init__(self, folder: Path, num_bytes: int, pages: Pages):
        import asyncio
        import threading

        os.environ.update(LMCACHE_TRACK_USAGE="false", LMCACHE_LOG_LEVEL="ERROR")
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

        torch.set_num_threads(1)
        self.torch, self.format, self.folder, self.pages = torch, MemoryFormat.KV_2LTD, folder, pages
        folder.mkdir(parents=True, exist_ok=True)
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        shape = (LAYERS, 2, CHUNK_TOKENS, KV_HEADS, HEAD_DIM)
        metadata = LMCacheMetadata(
            model_name="bench", world_size=1, local_world_size=1, worker_id=0, local_worker_id=0,
            kv_dtype=torch.bfloat16, kv_shape=shape,
        )  # fmt: skip
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK_TOKENS, local_cpu=True, max_local_cpu_size=2.0, local_disk=f"{folder}/",
            max_local_disk_size=1000.0, extra_config={"use_odirect": self.is_direct},
        )  # fmt: skip
        self.memory = LocalCPUBackend(config, metadata, "cpu")
        self.disk = LocalDiskBackend(config, loop, self.memory, "cpu", metadata=metadata)
        self.shape = torch.Size((2, LAYERS, CHUNK_TOKENS, KV_HEADS * HEAD_DIM))
        self.keys = [CacheEngineKey("bench", 1, 0, 1000 + n, torch.bfloat16) for n in range(num_bytes // CHUNK_BYTES)]
        self.sources = sources(CHUNK_BYTES)

    def write(self) -> dict:
        for number, key in enumerate(self.keys):
            chunk = self.memory.allocate(self.shape, self.torch.bfloat16, self.format)
            self._bytes_of(chunk)[:] = self.sources[number % SOURCES]
            self.disk.submit_put_task(key, chunk)
            chunk.ref_count_down()
        while any(self.disk.exists_in_put_tasks(key) for key in self.keys):
            time.sleep(0.002)
        sync_files(self.folder)
        return {}

    def read(self) -> dict:
        """batched_get_blocking: reads by its own four threads."""
        for first in range(0, len(self.keys), SOURCES):
            self._keep(self.disk.batched_get_blocking(self.keys[first : first + SOURCES]))
        return {}

    def read_single(self) -> dict:
        """get_blocking, chunk by chunk."""
        for key in self.keys:
            self._keep([self.disk.get_blocking(key)])
        return {}

    def _keep(self, chunks: list) -> None:
        for chunk in chunks:
            self.pages.copy(self._bytes_of(chunk))
            chunk.ref_count_down()

    def _bytes_of(self, chunk) -> np.ndarray:
        return chunk.tensor.view(self.torch.uint8).flatten().numpy()

    def look(self) -> dict:
        """How many chunks that another process wrote are there for this one."""
        return {"seen": sum(self.disk.contains(key) for key in self.keys), "of": len(self.keys)}

    def clear(self) -> dict:
        for key in self.keys:
            self.disk.remove(key)
        return {}

    def check(self) -> None:
        assert np.array_equal(self.pages.last, self.sources[(len(self.keys) - 1) % SOURCES])


class LMCacheDirect(LMCache):
    """The same with `use_odirect`."""

    is_direct = True


class Safetensors:
    """A file of one tensor for every chunk, mapped and copied: a mapping alone has read nothing."""

    def __init__(self, folder: Path, num_bytes: int, pages: Pages):
        import safetensors.torch
        import torch

        self.format, self.folder, self.pages = safetensors.torch, folder, pages
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = [folder / f"{n:04d}.safetensors" for n in range(num_bytes // CHUNK_BYTES)]
        self.sources = sources(CHUNK_BYTES)
        self.tensors = [torch.from_numpy(source.copy()) for source in self.sources]

    def write(self) -> dict:
        for number, path in enumerate(self.paths):
            self.format.save_file({"kv": self.tensors[number % SOURCES]}, path)
        sync_files(self.folder)
        return {}

    def read(self) -> dict:
        for path in self.paths:
            self.pages.next(CHUNK_BYTES)[:] = self.format.load_file(path)["kv"].numpy()
        return {}

    def check(self) -> None:
        assert np.array_equal(self.pages.last, self.sources[(len(self.paths) - 1) % SOURCES])


class Raw:
    """One file, one thread: write() and fsync(); read() through the page cache."""

    def __init__(self, folder: Path, num_bytes: int, pages: Pages):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.pages = folder / "raw", pages
        self.count, self.sources = num_bytes // BLOCK_BYTES, sources(BLOCK_BYTES)

    def write(self) -> dict:
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in range(self.count):
            os.write(fd, self.sources[number % SOURCES])
        os.fsync(fd)
        os.close(fd)
        return {}

    def read(self) -> dict:
        fd = os.open(self.path, os.O_RDONLY)
        for _ in range(self.count):
            assert os.readv(fd, [self.pages.next(BLOCK_BYTES)]) == BLOCK_BYTES
        os.close(fd)
        return {}

    def check(self) -> None:
        assert np.array_equal(self.pages.last, self.sources[(self.count - 1) % SOURCES])


PEERS = {
    "hpckv": Hpckv,
    "lmcache": LMCache,
    "lmcache-direct": LMCacheDirect,
    "safetensors": Safetensors,
    "raw": Raw,
}


def main() -> None:
    """Steps from stdin, one a line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("peer", choices=PEERS)
    ap.add_argument("--folder", type=Path, required=True)
    ap.add_argument("--gib", type=float, default=1.0)
    args = ap.parse_args()
    num_bytes = int(args.gib * 1024**3)
    pages = Pages()
    peer = PEERS[args.peer](args.folder, num_bytes, pages)
    print("READY", flush=True)
    for line in sys.stdin:
        step, pages.copy_s = line.strip(), 0.0
        before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        found = getattr(peer, step)()
        wall_s, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
        if step.startswith("read"):
            peer.check()
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print("RESULT " + json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "copy_s": pages.copy_s, **found}), flush=True)


if __name__ == "__main__":
    main()
