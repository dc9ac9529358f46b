"""How long reading a prefix takes from each tier of a store on this node, measured with blocks of a model's real size.

The blocks are random bytes in a namespace of their own, which is deleted afterwards; what a process leaves that is killed expires
within an hour. Files are read with this node's page cache emptied of them; what a file server keeps in its memory is as it is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from hpckv.errors import StoreError
from hpckv.quantity import ByteSize
from hpckv.store.block import ROOT_KEY, BlockGeometry
from hpckv.store.config import StoreConfig
from hpckv.store.direct_io import aligned_buffer
from hpckv.store.identity import Identity, Namespace
from hpckv.store.layout import StoreLayout
from hpckv.store.local_disk import find_local_folder
from hpckv.store.node_folder import remove
from hpckv.store.opening import open_store
from hpckv.store.root import StoreRoot
from hpckv.store.segment import StoredBlock
from hpckv.store.tier import PutOutcome, Tier
from hpckv.store.tiered_store import TieredStore

_PAYLOADS = 8
_ROUNDS = 3
_PATIENCE_S = 30.0
"""A tier that takes no block for so long is full, or only to be read."""
_DEADLINE_S = 600.0


@dataclass(frozen=True)
class TierReads:
    """What reading from one tier takes."""

    tier: str
    """`host`, `local` or `shared`."""
    place: str
    """Its folder; empty for memory."""
    seconds: dict[int, float] = field(default_factory=dict)
    """By number of blocks: from a fetch's start to its last block, the median of three."""
    trouble: str = ""
    """Why there are no seconds."""


def read_tiers(
    config: StoreConfig, geometry: BlockGeometry, counts: Sequence[int], step: Callable[[], None] = lambda: None
) -> list[TierReads]:
    """Measure every tier that a run with this configuration has on this node, the nearest first.

    `counts` are numbers of blocks; `step` is called after each of them. Where there is no store yet, one is made beside its place
    and removed. Raises `StoreError`, `AccessError`.
    """
    with _place(Path(config.shared)) as place:
        namespace = Namespace(Identity(weights=f"bench-{secrets.token_hex(16)}", config={}), {"dtype": "bench"})
        local = find_local_folder(config.local, place, config.site_local)
        store = open_store(_for_bench(config, place, max(counts) * geometry.block_bytes), namespace, geometry)
        copies = _copies(StoreRoot.open(place), local)
        folders = _folders(namespace, StoreRoot.open(place), copies)
        try:
            blocks = _blocks(geometry, max(counts))
            places = {"shared": config.shared, "local": str(local)}
            return [
                _read(tier, store, blocks, counts, folders, places.get(tier.name, ""), step) for tier in store.tiers
            ]
        finally:
            store.close()
            # Of a store that was made for this everything goes.
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            for folder in copies if place != Path(config.shared) else ():
                remove(folder)


def _read(
    tier: Tier,
    store: TieredStore,
    blocks: Sequence[StoredBlock],
    counts: Sequence[int],
    folders: Sequence[Path],
    place: str,
    step: Callable[[], None],
) -> TierReads:
    """One tier alone, by the same readers that a run has."""
    if not _put_all(tier, blocks):
        return TierReads(tier.name, place, trouble="takes no blocks: it is full, beyond a quota, or only to be read")
    alone = TieredStore([tier], epoch_key=store.epoch_key, deadline_s=_DEADLINE_S, buffers=store.buffers)
    keys = [block.key for block in blocks]
    seconds = dict[int, float]()
    for count in counts:
        found = []
        for _ in range(_ROUNDS):
            _drop_cache(folders)
            fetch = alone.fetch(keys[:count], ROOT_KEY)
            while not fetch.is_done:
                fetch.wait(1.0)
            if len(fetch.loaded) < count:
                why = ", ".join(tier.stats.misses) or "no answer"
                return TierReads(tier.name, place, seconds, f"blocks that were written cannot be read ({why})")
            found.append(fetch.seconds)
            del fetch  # and with it its buffers
        seconds[count] = statistics.median(found)
        step()
    return TierReads(tier.name, place, seconds)


def _put_all(tier: Tier, blocks: Sequence[StoredBlock]) -> bool:
    """Write them, as fast as the tier takes them, and wait until they are where readers look."""
    last = time.monotonic()
    for block in blocks:
        while tier.put(block, keeps_payload=True) is PutOutcome.DROPPED:
            if time.monotonic() - last > _PATIENCE_S:
                return False
            time.sleep(0.005)
        last = time.monotonic()
    tier.flush()
    return bool(tier.present([block.key for block in blocks]).all())


def _blocks(geometry: BlockGeometry, count: int) -> list[StoredBlock]:
    """Distinct keys over a few payloads, page-aligned as an engine's copies are."""
    random = np.random.default_rng()
    payloads = [aligned_buffer(geometry.block_bytes) for _ in range(min(count, _PAYLOADS))]
    for payload in payloads:
        payload[:] = random.bytes(geometry.block_bytes)
    keys = [ROOT_KEY, *(secrets.token_bytes(32) for _ in range(count))]
    return [
        StoredBlock(keys[n + 1], keys[n], n * geometry.block_tokens, payloads[n % len(payloads)]) for n in range(count)
    ]


def _drop_cache(folders: Sequence[Path]) -> None:
    for path in (path for folder in folders for path in folder.glob("**/*")):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _for_bench(config: StoreConfig, place: Path, num_bytes: int) -> StoreConfig:
    """The same tiers, with room for what is measured."""
    return msgspec.structs.replace(
        config,
        shared=str(place),
        read=True,
        write="all",
        bridging="off",
        keep="1h",
        private=False,
        read_rate=None,
        host_size=ByteSize(config.host_size and max(config.host_size, num_bytes)),
        local_size=ByteSize(max(config.local_size, 2 * num_bytes)),
    )


@contextlib.contextmanager
def _place(shared: Path) -> Iterator[Path]:
    """The store, or where there is none a folder beside its place that is gone afterwards."""
    if StoreRoot.exists(shared):
        yield shared
        return
    above = next(folder for folder in shared.absolute().parents if folder.is_dir())
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{shared.name}-bench-", dir=above))
    except OSError as error:
        raise StoreError(f"store {shared}: there is none, and none can be tried in {above}: {error.strerror}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copies(root: StoreRoot, local: Path | None) -> list[Path]:
    """This user's folders of one store on this node's disk."""
    return list((local / f"hpckv-{os.getuid()}").glob(f"{root.policy.uuid}*/")) if local else []


def _folders(namespace: Namespace, root: StoreRoot, copies: Sequence[Path]) -> list[Path]:
    """Everything of one namespace, in the store and on this node's disk."""
    uid, name = os.getuid(), StoreLayout.namespace_name(namespace.digest, root.policy.epoch)
    layouts = [root.layout, *map(StoreLayout, copies)]
    found = [folder for layout in layouts for folder in (layout.segments(uid, name), layout.indexes(uid, name))]
    return found + [layout.node_index(name) for layout in layouts[1:]]
