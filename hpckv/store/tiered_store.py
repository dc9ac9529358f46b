"""The tiers of one namespace behind one door: look up, load towards the device, keep what was computed.

Tiers are ordered from near to far. A block loaded from a far tier is put into the nearer ones on its way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from hpckv.log import warn_once
from hpckv.store.audit import Auditor
from hpckv.store.block import ROOT_KEY
from hpckv.store.direct_io import BufferPool
from hpckv.store.fetch import Breaker, DaemonPool, Fetch, Job, Loaded
from hpckv.store.segment import StoredBlock
from hpckv.store.tier import PutOutcome, Tier

_log = logging.getLogger(__name__)

_READERS = 4


class TieredStore:
    """Blocks of one namespace over its tiers."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        epoch_key: bytes,
        identity: bytes = bytes(32),
        reads: bool = True,
        writes: bool = True,
        deadline_s: float = 10.0,
        auditor: Auditor | None = None,
        buffers: BufferPool,
        on_closed: Callable[[], None] = lambda: None,
    ) -> None:
        """`epoch_key` and `identity` enter the block keys. A `fetch()` waits for no block longer than `deadline_s`."""
        self.tiers = list(tiers)
        self.epoch_key, self.identity = epoch_key, identity
        self.reads, self.writes = reads, writes
        self.auditor = auditor
        self.buffers = buffers
        """What blocks are read into and written from."""
        self.breakers = [Breaker() for _ in tiers]
        self._deadline_s, self._on_closed = deadline_s, on_closed
        self._generation = 0
        self._pool = DaemonPool(_READERS, "hpckv-read")

    def match(self, keys: Sequence[bytes]) -> int:
        """How many of a prefix's leading blocks some tier believes to have. No I/O."""
        if not self.reads or not keys or self._pool.is_exhausted:
            return 0
        found = np.zeros(len(keys), dtype=bool)
        for tier, breaker in zip(self.tiers, self.breakers, strict=True):
            if not breaker.is_open:
                found |= tier.present(keys)
            if found.all():
                return len(keys)
        return int(np.argmin(found))

    def nearest(self, keys: Sequence[bytes]) -> list[str]:
        """The name of the nearest tier for each of the blocks that `match` counts. No I/O."""
        keys = keys[: self.match(keys)]
        names = [""] * len(keys)
        for tier, breaker in reversed(list(zip(self.tiers, self.breakers, strict=True))):
            if keys and not breaker.is_open:
                names = [tier.name if here else name for name, here in zip(names, tier.present(keys), strict=True)]
        return names

    def load(self, block: StoredBlock, on_tier: Callable[[int], None] = lambda _: None) -> Loaded | None:
        """A verified block from the nearest tier that has it, kept in the nearer ones.

        None is a miss; the block's own payload is not looked at. `on_tier` hears which tier is about to be read.
        """
        if not self.reads:
            return None
        generation = self._generation
        for number, (tier, breaker) in enumerate(zip(self.tiers, self.breakers, strict=True)):
            if breaker.is_open or not tier.present([block.key])[0]:
                continue
            on_tier(number)
            writer = self._writer(block.key)
            payload = tier.get(block.key)
            if payload is not None:
                breaker.note_success()
                # A copy of a converted block would look like one of our own; and nothing is copied that was found out meanwhile.
                nearer_tiers = [] if tier.is_bridge or generation != self._generation else self.tiers[:number]
                for nearer in nearer_tiers:
                    nearer.put(StoredBlock(block.key, block.parent, block.position, payload), keeps_payload=True)
                return Loaded(tier.name, payload, tier.is_bridge, writer)
        return None

    def _writer(self, key: bytes) -> int | None:
        """Whose block it is: a copy's does not tell, the tier that it was copied from may."""
        found = (tier.writer(key) for tier in self.tiers)
        return next((uid for uid in found if uid is not None), None)

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

    def save(self, block: StoredBlock, *, keeps_payload: bool = False) -> bool:
        """Offer a computed block to every tier that keeps more than copies; whether any keeps it.

        With `keeps_payload` nobody will change the payload any more.
        """
        if not self.writes:
            return False
        outcomes = [tier.put(block, keeps_payload=keeps_payload) for tier in self.tiers if not tier.keeps_copies_only]
        return any(outcome is not PutOutcome.DROPPED for outcome in outcomes)

    def forget_copies(self) -> None:
        """Drop what this run holds or wrote: some of it was found to be wrong, or was computed after what was."""
        self._generation += 1
        for tier in self.tiers:
            tier.take_back()

    def flush(self) -> None:
        for tier in self.tiers:
            tier.flush()

    def close(self) -> None:
        if self.auditor:
            self.auditor.finish(self._deadline_s)
        for tier in self.tiers:
            tier.close()
        self._on_closed()
