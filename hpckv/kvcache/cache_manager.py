"""The one object the scheduler asks for pages: prefix match, allocation, single flight, offload and onboard.

It knows tokens, keys and page numbers; the `Connector` moves bytes between pages and the store.

Single flight: while a sequence computes a block, others that need the same block next are held back and match it
when it is complete. A block is therefore computed once, however many requests of a step share it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from hpckv.kvcache.cached_sequence import CachedSequence
from hpckv.kvcache.page_pool import PagePool
from hpckv.store.fetch import Fetch, Loaded


class Connector(ABC):
    """Between pages and a store of blocks."""

    @abstractmethod
    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks are worth trying to load; no I/O."""

    @abstractmethod
    def fetch(self, keys: Sequence[bytes], parent: bytes) -> Fetch | None:
        """Begin to bring consecutive blocks into memory; None where computing them is the faster way."""

    @abstractmethod
    def place(self, fetch: Fetch, first: int, pages: Sequence[int]) -> None:
        """Copy blocks that `fetch` brought, from its number `first` on, into pages."""

    @abstractmethod
    def end(self, fetch: Fetch) -> None:
        """Nobody waits for it any more: let go of what it holds."""

    @abstractmethod
    def offload(self, key: bytes, parent: bytes, position: int, page: int) -> None:
        """Offer a complete block to the store."""


class Admission(Enum):
    """What became of a sequence that asked to start."""

    ADMITTED = "admitted"
    NO_PAGES = "no pages"
    BUSY = "busy"
    """It has stored blocks, and enough others are loading theirs."""
    LOADING = "loading"
    """Its stored blocks are on their way: ask again when `seq.fetch.is_done`."""


@dataclass
class CacheStats:
    """Append-only counters, in blocks."""

    registered: int = 0
    onboarded: Counter[str] = field(default_factory=Counter)
    bridged: int = 0
    """Onboarded ones that were converted from another dtype."""
    offloaded: int = 0
    holds: int = 0


class CacheManager:
    """Pages of all sequences on one device."""

    def __init__(
        self,
        pool_pages: int,
        block_tokens: int,
        key_of: Callable[[bytes | None, Sequence[int]], bytes],
        *,
        connector: Connector | None = None,
        writes: str = "off",
        reuse: bool = True,
    ) -> None:
        """`key_of(parent key or None, tokens)` gives a block's key; `writes` is the store's admission policy.

        Without `reuse` no block is ever matched, shared or kept.
        """
        self._reuse = reuse
        self.block_tokens = block_tokens
        self.pool = PagePool(pool_pages, is_wanted=lambda key: self._uses_left.get(key, 0) > 0)
        self.stats = CacheStats()
        self._key_of = key_of
        self._connector = connector
        self._writes = writes
        self._uses_left: dict[bytes, int] = {}
        self._repeated: set[bytes] = set()
        self._offloaded: set[bytes] = set()
        self._foreign: set[bytes] = set()
        """Blocks that came over a bridge, and what was computed after them: never offered to the store."""
        self._computing: dict[bytes, CachedSequence] = {}
        self._fetching: dict[bytes, CachedSequence] = {}
        self._arrived: list[bytes] = []
        self._num_admissions = 0

    def expect(self, keys: Sequence[bytes]) -> None:
        """A sequence that has not started will use these blocks; they are kept for it where possible."""
        for key in keys:
            left = self._uses_left.get(key, 0) + 1
            self._uses_left[key] = left
            if left > 1:
                self._repeated.add(key)

    def forget_use(self, keys: Sequence[bytes]) -> None:
        """A request that was expected to use these blocks has had its use (or never will)."""
        for key in keys:
            left = self._uses_left.get(key, 0) - 1
            if left > 0:
                self._uses_left[key] = left
            elif self._uses_left.pop(key, None) is not None:
                self.pool.recheck(key)

    def admit(
        self, seq: CachedSequence, *, may_evict_wanted: bool, reserve: int = 0, may_fetch: bool = True
    ) -> Admission | bytes:
        """Match a sequence's prefix and take pages for all its tokens, leaving `reserve` pages for others.

        Returns ADMITTED, NO_PAGES, BUSY, LOADING, or, if it must wait for another sequence, the key of the last block it waits
        for. Admitted, `num_computed` tells what was found; with everything found the last token is computed again for
        its logits. Only blocks that are verified and in memory count as found.
        """
        assert not seq.pages
        found = [] if seq.is_audit else self._on_device(seq.keys)
        stored = self._from_store(seq, len(found), may_fetch)
        if isinstance(stored, (Admission, bytes)):
            return stored
        awaited = reached = len(found) + len(stored)
        while self._reuse and not seq.is_audit and awaited < len(seq.keys) and seq.keys[awaited] in self._computing:
            awaited += 1
        if awaited > reached:
            self.stats.holds += 1
            return seq.keys[awaited - 1]
        size, matched = self.block_tokens, len(found)
        for page in found:
            self.pool.retain(page)
        needed = -(-len(seq.tokens) // size) - matched
        if needed + reserve > (self.pool.num_available if may_evict_wanted else self.pool.num_unwanted):
            self._release(found)
            return Admission.NO_PAGES
        self._num_admissions += 1
        seq.admission = self._num_admissions
        seq.pages = found + self._allocate(needed)
        seq.num_registered = matched
        self._onboard(seq, stored)
        seq.num_computed = min((matched + len(stored)) * size, len(seq.tokens) - 1)
        if seq.cached is None:
            self._count_first_match(seq, matched, stored)
        if self._reuse:
            for key in seq.keys[seq.num_registered :]:
                self._computing.setdefault(key, seq)
        self._end_fetch(seq)
        return Admission.ADMITTED

    def num_on_device(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks are in pages."""
        return len(self._on_device(keys))

    def _on_device(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the leading blocks."""
        found: list[int] = []
        if self._reuse:
            for key in keys:
                page = self.pool.find(key)
                if page is None:
                    break
                found.append(page)
        return found

    def _from_store(self, seq: CachedSequence, first: int, may_fetch: bool) -> list[Loaded] | Admission | bytes:
        """Blocks from number `first` on that the store gave; or what to wait for."""
        if self._connector is None or not self._reuse or seq.is_audit:
            return []
        if seq.fetch is not None and seq.fetch_first > first:  # what came before it was evicted meanwhile
            self._end_fetch(seq)
        if seq.fetch is None:
            count = 0 if seq.skips_store else self._connector.match(seq.keys[first:])
            wanted = seq.keys[first : first + count]
            if others := [key for key in wanted if key in self._fetching]:
                self.stats.holds += 1
                return others[-1]
            if not wanted:
                return []
            if not may_fetch:
                return Admission.BUSY
            seq.fetch = self._connector.fetch(wanted, seq.keys[first - 1] if first else bytes(len(wanted[0])))
            if seq.fetch is None:
                seq.skips_store = True
                return []
            seq.fetch_first = first
            self._fetching.update((key, seq) for key in wanted)
        if not seq.fetch.is_done:
            return Admission.LOADING
        return seq.fetch.loaded[first - seq.fetch_first :]

    def _end_fetch(self, seq: CachedSequence) -> None:
        if seq.fetch is not None:
            for job in seq.fetch.jobs:
                if self._fetching.get(job.key) is seq:
                    del self._fetching[job.key]
                    self._arrived.append(job.key)
            assert self._connector
            self._connector.end(seq.fetch)
            seq.fetch = None

    def give_up(self, seq: CachedSequence) -> None:
        """A sequence that is not admitted will not come again."""
        self._end_fetch(seq)

    def disown(self) -> None:
        """Nothing that is on the device now is matched any more, and what was offered to the store is offered again."""
        self.pool.disown()
        self._offloaded.clear()

    def take_arrived(self) -> list[bytes]:
        """Keys that nobody is fetching any more: those who waited for them may ask again."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def _count_first_match(self, seq: CachedSequence, on_device: int, stored: Sequence[Loaded]) -> None:
        size = self.block_tokens
        seq.cached = Counter(device=min(on_device * size, seq.num_computed))
        for number, loaded in enumerate(stored, on_device):
            tokens = min(size, seq.num_computed - number * size)
            seq.cached[loaded.tier] += tokens
            if loaded.writer is not None:
                seq.by_writer[loaded.writer] += tokens
        if self._writes == "planned":  # a second use is reason enough to keep a block
            for number in range(on_device):
                self._offload(seq, number)

    def _onboard(self, seq: CachedSequence, stored: Sequence[Loaded]) -> None:
        if not stored:
            return
        assert self._connector
        assert seq.fetch
        first = seq.num_registered
        end = first + len(stored)
        self._connector.place(seq.fetch, first - seq.fetch_first, seq.pages[first:end])
        self.stats.onboarded.update(loaded.tier for loaded in stored)
        for number in range(first, end):
            self.pool.register(seq.pages[number], seq.keys[number])
            self._offloaded.add(seq.keys[number])
        bridged = {seq.keys[first + n] for n, loaded in enumerate(stored) if loaded.is_bridged}
        self._foreign |= bridged
        self.stats.bridged += len(bridged)
        seq.num_registered = end

    def grow(self, seq: CachedSequence, num_tokens: int) -> bool:
        """Make sure the sequence has pages for its first `num_tokens` tokens; False if there are none."""
        needed = -(-num_tokens // self.block_tokens) - len(seq.pages)
        if needed <= 0:
            return True
        if needed > self.pool.num_available:
            return False
        seq.pages += self._allocate(needed)
        return True

    def commit(self, seq: CachedSequence, num_computed: int) -> list[bytes]:
        """The first `num_computed` tokens are in their pages now. Returns keys of blocks that became complete."""
        size = self.block_tokens
        seq.num_computed = num_computed
        completed: list[bytes] = []
        if not self._reuse or num_computed // size == seq.num_registered:
            return completed
        for number in range(seq.num_registered, num_computed // size):
            if number == len(seq.keys):
                parent = seq.keys[-1] if seq.keys else None
                seq.keys.append(self._key_of(parent, seq.tokens[number * size : (number + 1) * size]))
            key = seq.keys[number]
            if number and seq.keys[number - 1] in self._foreign:
                self._foreign.add(key)
            if self.pool.register(seq.pages[number], key):
                self.stats.registered += 1
                if self._writes == "all" or (self._writes == "planned" and key in self._repeated):
                    self._offload(seq, number)
            self._computing.pop(key, None)
            completed.append(key)
            seq.num_registered = number + 1
        return completed

    def release(self, seq: CachedSequence) -> list[bytes]:
        """Give a sequence's pages back. Returns keys it was computing and will not complete."""
        # Deepest first: a block is of no use once its parent is gone, so parents are evicted last.
        self._release(list(reversed(seq.pages)))
        abandoned = [k for k in seq.keys[seq.num_registered :] if self._computing.get(k) is seq]
        for key in abandoned:
            del self._computing[key]
        seq.pages, seq.num_computed, seq.num_registered = [], 0, 0
        return abandoned

    def check_integrity(self, running: Sequence[CachedSequence]) -> None:
        """Raise `AssertionError` if pages and sequences disagree."""
        self.pool.check_integrity()
        references = Counter(page for seq in running for page in seq.pages)
        assert references == Counter({p: c for p, c in enumerate(self.pool._references) if c})
        for seq in running:
            assert seq.num_computed <= len(seq.pages) * self.block_tokens

    def _offload(self, seq: CachedSequence, number: int) -> None:
        key = seq.keys[number]
        if self._connector is None or key in self._offloaded or key in self._foreign:
            return
        parent = seq.keys[number - 1] if number else bytes(len(seq.keys[0]))
        self._connector.offload(seq.keys[number], parent, number * self.block_tokens, seq.pages[number])
        self._offloaded.add(seq.keys[number])
        self.stats.offloaded += 1

    def _allocate(self, count: int) -> list[int]:
        pages = [self.pool.allocate() for _ in range(count)]
        assert None not in pages
        return [p for p in pages if p is not None]

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.pool.release(page)
