"""The tiers of one namespace behind one door: look up, load towards the device, keep what was computed.

Tiers are ordered from near to far. A block loaded from a far tier is put into the nearer ones on its way.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from hpckv.errors import StoreError
from hpckv.log import warn_once
from hpckv.store.block import ROOT_KEY, BlockGeometry, check_golden_vector
from hpckv.store.catalog import Catalog
from hpckv.store.config import StoreConfig
from hpckv.store.durable import publish
from hpckv.store.fetch import Breaker, DaemonPool, Fetch, Job, Loaded, within
from hpckv.store.file_tier import FileTier
from hpckv.store.host_tier import HostTier
from hpckv.store.identity import Namespace
from hpckv.store.layout import StoreLayout
from hpckv.store.local_disk import find_local_folder
from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.store.segment import SegmentContext, StoredBlock
from hpckv.store.tier import PutOutcome, Tier

_log = logging.getLogger(__name__)

_READERS = 4
_LOCAL_SEGMENT_BYTES = 64 * 1024**2
_LOCAL_SEAL_S = 5.0


class TieredStore:
    """Blocks of one namespace over its tiers."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        epoch_key: bytes,
        reads: bool = True,
        writes: bool = True,
        deadline_s: float = 10.0,
    ) -> None:
        """A `fetch()` waits for no block longer than `deadline_s`."""
        self.tiers = list(tiers)
        self.epoch_key = epoch_key
        self.reads, self.writes = reads, writes
        self.breakers = [Breaker() for _ in tiers]
        self._deadline_s = deadline_s
        self._pool = DaemonPool(_READERS, "hpckv-read")

    def match(self, keys: Sequence[bytes]) -> int:
        """How many of a prefix's leading blocks some tier believes to have. No I/O."""
        if not self.reads or not keys:
            return 0
        found = np.zeros(len(keys), dtype=bool)
        for tier, breaker in zip(self.tiers, self.breakers, strict=True):
            if not breaker.is_open:
                found |= tier.present(keys)
            if found.all():
                return len(keys)
        return int(np.argmin(found))

    def load(self, block: StoredBlock, on_tier: Callable[[int], None] = lambda _: None) -> Loaded | None:
        """A verified block from the nearest tier that has it, kept in the nearer ones: that tier's name and the bytes.

        None is a miss; the block's own payload is not looked at. `on_tier` hears which tier is about to be read.
        """
        if not self.reads:
            return None
        for number, (tier, breaker) in enumerate(zip(self.tiers, self.breakers, strict=True)):
            if breaker.is_open or not tier.present([block.key])[0]:
                continue
            on_tier(number)
            payload = tier.get(block.key)
            if payload is not None:
                breaker.note_success()
                for nearer in self.tiers[:number]:
                    nearer.put(StoredBlock(block.key, block.parent, block.position, payload), keeps_payload=True)
                return tier.name, payload
        return None

    def fetch(self, keys: Sequence[bytes], parent: bytes = ROOT_KEY) -> Fetch:
        """Begin to load consecutive blocks of a prefix, the first of which follows `parent`. Returns at once."""
        fetch = Fetch(keys, parent, self._deadline_s, self._note_late)

        def read(job: Job) -> None:
            loaded = None
            if not fetch.is_over:
                job.is_started = True
                try:
                    loaded = self.load(StoredBlock(job.key, job.parent, 0, b""), on_tier=job.enter)
                except Exception as error:  # noqa: BLE001 - trouble with a store is a miss
                    warn_once(_log, f"store: {type(error).__name__}: {error}; blocks are computed again")
            if fetch.finish(job, loaded):
                self._pool.hangs(-1)

        for job in fetch.jobs:
            self._pool.submit(partial(read, job))
        return fetch

    def _note_late(self, job: Job) -> None:
        self._pool.hangs(1)
        tier = self.tiers[job.tier]
        tier.stats.count_miss("timeout")
        if self.breakers[job.tier].note_timeout():
            _log.warning("store: the %s tier does not answer in time; it is left alone for a while", tier.name)

    def save(self, block: StoredBlock) -> bool:
        """Offer a computed block to every tier that keeps more than copies; whether any keeps it."""
        if not self.writes:
            return False
        outcomes = [tier.put(block) for tier in self.tiers if not tier.keeps_copies_only]
        return any(outcome is not PutOutcome.DROPPED for outcome in outcomes)

    def flush(self) -> None:
        for tier in self.tiers:
            tier.flush()

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()


def open_store(config: StoreConfig, namespace: Namespace, geometry: BlockGeometry) -> TieredStore:
    """Open the store of `config`; raises `StoreError` or `AccessError` if it is not usable.

    Where there is none yet, a private one is made. One that can be read and not written is used for reading, said once.
    """
    check_golden_vector()
    path = Path(config.shared)
    try:
        root, epoch_key, local = within(config.deadline_s, lambda: _look(config, path))
    except TimeoutError as error:
        raise StoreError(f"store {path}: {error.strerror}") from None
    context = SegmentContext(
        namespace=namespace.digest,
        namespace_json=json.dumps(namespace.record, sort_keys=True).encode(),
        geometry=geometry,
        epoch=root.policy.epoch,
        epoch_key=epoch_key,
    )
    shared = Catalog(root.layout, context, trusted_uids=root.trusted_uids())
    tiers: list[Tier] = []
    if config.host_size >= geometry.block_bytes:
        tiers.append(HostTier(geometry, budget_bytes=config.host_size))
    if local is not None:
        tiers.append(_local_tier(config, local, root, context))
    tiers.append(
        FileTier(
            shared,
            context,
            _own_folder(config, root, shared, namespace) if config.write != "off" else None,
            segment_bytes=config.segment_size,
            seal_s=config.seal_s,
            gid=root.policy.group,
            patience_s=config.deadline_s,
            root=root,
        )
    )
    return TieredStore(
        tiers,
        epoch_key=context.epoch_key,
        reads=config.read,
        writes=config.write != "off",
        deadline_s=config.deadline_s,
    )


def _look(config: StoreConfig, path: Path) -> tuple[StoreRoot, bytes, Path | None]:
    """The store, its key, and where this node keeps copies."""
    root = StoreRoot.open(path) if StoreRoot.exists(path) else StoreRoot.create(path, StorePolicy.new())
    return root, root.epoch_key(), find_local_folder(config.local, path)


def _own_folder(config: StoreConfig, root: StoreRoot, catalog: Catalog, namespace: Namespace) -> Path | None:
    """Where this user's segments go; None, said once, where the store can only be read."""
    own = catalog.own_folder(os.getuid())

    def make() -> None:
        root.make_own_folder(own)
        _verify_identity(own / "identity.json", namespace, root.policy.group)

    try:
        within(config.deadline_s, make)
    except OSError as error:
        warn_once(_log, f"store {own}: {error.strerror}; reading only")
        return None
    return own


def _local_tier(config: StoreConfig, folder: Path, root: StoreRoot, context: SegmentContext) -> FileTier:
    """Copies on this node's disk, shared by this user's processes here."""
    layout = StoreLayout(folder / f"hpckv-{os.getuid()}" / root.policy.uuid)
    catalog = Catalog(layout, context, trusted_uids=frozenset({os.getuid()}))
    own = catalog.own_folder(os.getuid())
    layout.root.mkdir(parents=True, mode=0o700, exist_ok=True)
    own.mkdir(parents=True, exist_ok=True)
    return FileTier(
        catalog,
        context,
        own,
        name="local",
        segment_bytes=min(_LOCAL_SEGMENT_BYTES, config.segment_size),
        seal_s=_LOCAL_SEAL_S,
        budget_bytes=config.local_size,
        is_durable=False,
        keeps_copies_only=True,
        patience_s=config.deadline_s,
    )


def _verify_identity(path: Path, namespace: Namespace, gid: int | None) -> None:
    text = json.dumps(namespace.record, sort_keys=True, indent=2).encode()
    try:
        publish(path, [text], replace=False, gid=gid)
    except FileExistsError:
        if path.read_bytes() != text:
            raise StoreError(
                f"{path}: does not describe the model and settings of its folder's name; move the folder away"
            ) from None
