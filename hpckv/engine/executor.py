"""Where a plan is computed: on this process alone, or on all ranks of a replica under this one's direction."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from hpckv.comm.group import Pending, Watch
from hpckv.engine.rank import Rank
from hpckv.engine.sampler import Sampled
from hpckv.engine.scheduler import StepPlan
from hpckv.engine.station import LOAD_POLL_S, TOKENS_TAG, Results, Station, Times, Vote, results_shape, unpack_results
from hpckv.engine.step import RankChunk, rank_chunks
from hpckv.engine.step_message import (
    FIRST_INTS,
    EndFetch,
    Ints,
    MessageReader,
    MessageWriter,
    Offload,
    Operation,
    Place,
    StartFetch,
    StepMessage,
)
from hpckv.kvcache.cache_manager import Connector
from hpckv.kvcache.kv_pool import StoreConnector
from hpckv.kvcache.load_policy import LoadPolicy
from hpckv.store import TieredStore
from hpckv.store.fetch import Fetch, Job, Loaded


class Flight(ABC):
    """A plan under way."""

    plan: StepPlan

    @abstractmethod
    def result(self) -> list[Sampled]:
        """Wait for it: what was sampled, in the order of the chunks that sample."""


class Executor(ABC):
    """Computes plans in the order they are started; keeps `connector`, through which the cache reaches the store."""

    connector: Connector | None
    num_in_flight: int
    """So many plans may be under way."""

    @abstractmethod
    def start(self, plan: StepPlan) -> Flight:
        """Begin to compute a plan over sequences that are in no other flight."""

    @abstractmethod
    def note_loads(self) -> None:
        """Take in what stored blocks have come on all ranks."""

    @abstractmethod
    def wait_for_blocks(self, fetch: Fetch | None) -> None:
        """Nothing can be computed until stored blocks come: wait for some, not long."""

    @abstractmethod
    def finish(self) -> None:
        """No more plans will come."""


@dataclass
class _Landed(Flight):
    plan: StepPlan
    sampled: list[Sampled]

    def result(self) -> list[Sampled]:
        return self.sampled


class LocalExecutor(Executor):
    """This process has the whole model."""

    num_in_flight = 1

    def __init__(self, rank: Rank, policy: LoadPolicy) -> None:
        self._runner = rank.runner
        assert rank.pool is not None
        self.connector = StoreConnector(rank.pool, rank.store, policy) if rank.store else None

    def start(self, plan: StepPlan) -> Flight:
        return _Landed(plan, self._runner.run(rank_chunks(plan)))

    def note_loads(self) -> None:
        pass

    def wait_for_blocks(self, fetch: Fetch | None) -> None:
        if fetch is not None:
            fetch.wait(LOAD_POLL_S)

    def finish(self) -> None:
        pass


class AgreedFetch(Fetch):
    """Leading blocks of a prefix that every rank brings into its own memory: done when all have said how many came."""

    def __init__(self, number: int, keys: Sequence[bytes], parent: bytes) -> None:
        parents = [parent, *keys[:-1]]
        self.jobs = [Job(key, before) for key, before in zip(keys, parents, strict=True)]
        self.number, self.is_over = number, False
        self._own: Fetch | None = None
        self._agreed: list[Loaded] | None = None

    def settle(self, own: Fetch, count: int, first_bridged: int) -> None:
        """All ranks have `count` blocks; from number `first_bridged` on some rank has a converted one."""
        self._own = own
        self._agreed = [
            loaded._replace(is_bridged=loaded.is_bridged or n >= first_bridged)
            for n, loaded in enumerate(own.loaded[:count])
        ]

    @property
    def is_done(self) -> bool:
        return self._agreed is not None

    @property
    def loaded(self) -> list[Loaded]:
        return self._agreed or []

    @property
    def seconds(self) -> float:
        return self._own.seconds if self._own else 0.0


class SpreadConnector(Connector):
    """The cache's door to the stores of all ranks: what it asks for goes out with the next step."""

    def __init__(self, store: TieredStore, policy: LoadPolicy, block_tokens: int, block_bytes: int) -> None:
        self._store, self._policy = store, policy
        self._block_tokens, self._block_bytes = block_tokens, block_bytes
        self._numbers = itertools.count()
        self.operations: list[Operation] = []
        self.open: dict[int, AgreedFetch] = {}

    def match(self, keys: Sequence[bytes]) -> int:
        return self._store.match(keys)

    def fetch(self, keys: Sequence[bytes], parent: bytes) -> Fetch | None:
        if not self._policy.should_load(len(keys) * self._block_tokens, len(keys) * self._block_bytes):
            return None
        fetch = AgreedFetch(next(self._numbers), keys, parent)
        self.operations.append(StartFetch(fetch.number, tuple(keys), parent))
        self.open[fetch.number] = fetch
        return fetch

    def place(self, fetch: Fetch, first: int, pages: Sequence[int]) -> None:
        assert isinstance(fetch, AgreedFetch)
        self.operations.append(Place(fetch.number, first, tuple(pages)))
        self._policy.note_load(len(fetch.loaded) * self._block_bytes, fetch.seconds)

    def end(self, fetch: Fetch) -> None:
        assert isinstance(fetch, AgreedFetch)
        fetch.is_over = True
        del self.open[fetch.number]
        self.operations.append(EndFetch(fetch.number))

    def offload(self, key: bytes, parent: bytes, position: int, page: int) -> None:
        self.operations.append(Offload(key, parent, position, page))

    def take_operations(self) -> list[Operation]:
        operations, self.operations = self.operations, []
        return operations


@dataclass
class _Flying(Flight):
    plan: StepPlan
    chunks: list[RankChunk]
    pending: Pending
    results: Results
    watch: Watch
    times: Times

    def result(self) -> list[Sampled]:
        begun = time.perf_counter()
        self.watch.wait(self.pending, "the last stage's tokens")
        self.times.message_s += time.perf_counter() - begun
        return unpack_results(self.chunks, self.results)


class Coordinator(Executor):
    """Rank 0 of a replica: tells the others every step and does its own part of it."""

    def __init__(self, rank: Rank, policy: LoadPolicy) -> None:
        self.rank, self.world = rank, rank.world
        self.num_in_flight = rank.parallel.num_micro_batches
        self.station = Station(rank)
        self.rank_times: list[Times] = []
        """Of every rank, once it is finished."""
        geometry = rank.pages.geometry
        self.connector = self._spread = (
            SpreadConnector(rank.store, policy, geometry.block_tokens, geometry.block_bytes) if rank.store else None
        )
        self._writer = MessageWriter()
        self._numbers = itertools.count()
        self._votes: deque[Vote] = deque()
        self._broadcasts: deque[Pending] = deque()
        self.message_bytes = 0
        """Sent so far, to each rank."""

    def start(self, plan: StepPlan) -> Flight:
        chunks = rank_chunks(plan)
        operations = self._spread.take_operations() if self._spread else []
        number = next(self._numbers)
        self._broadcast(self._writer.encode(number, plan, operations))
        dims = self.world.dims
        flight = None
        if dims.pp > 1 and chunks:
            results = np.zeros(results_shape(chunks))
            source = self.world.rank_of(dims.pp - 1, 0)
            pending = self.world.group.receive(results, source, TOKENS_TAG)
            flight = _Flying(plan, chunks, pending, results, self.world.watch, self.station.times)
        sampled, vote = self.station.carry_out(StepMessage(number, chunks, operations))
        if vote is not None:
            self._votes.append(vote)
        return flight or _Landed(plan, sampled or [])

    def note_loads(self) -> None:
        while self._votes and self._votes[0].pending.is_done():
            vote = self._votes.popleft()
            assert self._spread is not None
            counts, bridged = vote.values.reshape(2, -1).tolist()
            for number, count, first in zip(vote.numbers, counts, bridged, strict=True):
                fetch = self._spread.open.get(number)
                if fetch is not None and count >= 0 and not fetch.is_done:
                    fetch.settle(self.station.fetches[number], count, first)

    def wait_for_blocks(self, fetch: Fetch | None) -> None:
        self.start(StepPlan())
        if self._votes:
            self.world.watch.wait(self._votes[-1].pending, "the other ranks to say which stored blocks came")
        self.note_loads()

    def finish(self) -> None:
        operations = self._spread.take_operations() if self._spread else []
        number = next(self._numbers)
        self._broadcast(self._writer.encode(number, StepPlan(), operations, is_last=True))
        self.station.carry_out(StepMessage(number, [], operations, is_last=True))
        self.rank_times = end_together(self.station)
        while self._broadcasts:
            self.world.watch.wait(self._broadcasts.popleft(), "the other ranks to take the last step")

    def _broadcast(self, array: Ints) -> None:
        first = np.zeros(FIRST_INTS, np.int32)
        first[: len(array)] = array[:FIRST_INTS]
        self._broadcasts.append(self.world.group.broadcast(first))
        self.message_bytes += first.nbytes
        if len(array) > FIRST_INTS:
            rest = array[FIRST_INTS:].copy()
            self._broadcasts.append(self.world.group.broadcast(rest))
            self.message_bytes += rest.nbytes
        while self._broadcasts and self._broadcasts[0].is_done():
            self._broadcasts.popleft()


def serve(rank: Rank) -> None:
    """Another rank: load, then carry out what rank 0 sends until it says that was the last step."""
    rank.load()
    if not rank.pages.num_pages:  # rank 0 found nothing to do
        return
    station, reader, world = Station(rank), MessageReader(), rank.world
    patience = Watch(rank.parallel.start_deadline_s, world.watch.check)
    first = np.zeros(FIRST_INTS, np.int32)
    pending = world.group.broadcast(first)
    is_last = False
    while not is_last:
        begun = time.perf_counter()
        patience.wait(pending, "rank 0's next step")
        array, total = first, int(first[2])
        if total > FIRST_INTS:
            rest = np.zeros(total - FIRST_INTS, np.int32)
            world.watch.wait(world.group.broadcast(rest), "the rest of rank 0's step")
            array = np.concatenate([first, rest])
        station.times.message_s += time.perf_counter() - begun
        message = reader.decode(array[:total])
        is_last = message.is_last
        if not is_last:  # on its way while this one is computed
            first = np.zeros(FIRST_INTS, np.int32)
            pending = world.group.broadcast(first)
        station.carry_out(message)
    end_together(station)


def end_together(station: Station) -> list[Times]:
    """Nothing is under way any more on any rank; every rank's times."""
    station.finish_sends()
    own = np.array(list(asdict(station.times).values()))
    whole = np.zeros((station.world.group.size, len(own)))
    station.world.watch.wait(station.world.group.all_gather(own, whole), "the other ranks to finish")
    names = [field.name for field in fields(Times)]
    return [Times(**dict(zip(names, row, strict=True))) for row in whole.tolist()]
