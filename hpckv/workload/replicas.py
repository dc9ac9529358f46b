"""The replicas of a run: one gives out work and takes in answers, all of them compute.

The router is rank 0 of the run. It reads the input, cuts the plan into subtrees (`routing.py`) and writes the answers;
rank 0 of every other replica computes what it is sent. They exchange messages (`comm/mailbox.py`) between their steps, so
neither ever waits for the other while there is something to compute. Messages are typed MessagePack, nothing is pickled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from hpckv.comm import World
from hpckv.comm.mailbox import Mailbox
from hpckv.engine.engine import Engine
from hpckv.engine.request import Answer, Request, Usage
from hpckv.errors import CapacityError
from hpckv.workload.routing import PLACES, Placement, Subtree
from hpckv.workload.summary import engine_record

_log = logging.getLogger(__name__)

_NAP_S = 0.001
_KEEP_ALIVE_S = 30.0
_QUEUED_BATCHES = 2
"""A replica is sent work until so many times `engine.max_requests` are there: enough to always fill a batch and to read ahead."""

Held = list[list[int]]
"""By subtree: blocks of its prefix at each of `routing.PLACES`."""


class Plan(msgspec.Struct, tag="plan"):
    """To a replica, once: what there will be to do."""

    prefixes: list[list[bytes]]
    max_tokens_in_use: int


class Work(msgspec.Struct, tag="work"):
    """To a replica: a subtree."""

    number: int
    requests: list[Request]


class Stop(msgspec.Struct, tag="stop"):
    """To a replica: drop what is unfinished, seal the store, and end."""


class Report(msgspec.Struct, tag="report"):
    """From a replica: answers, and where it is now ready to go on best."""

    answers: list[Answer] = []
    held: Held | None = None
    is_ready: bool = False


class Stopped(msgspec.Struct, tag="stopped"):
    """From a replica: there will be no more answers."""


class Closed(msgspec.Struct, tag="closed"):
    """From a replica, its last: its store is sealed. Its counters, as JSON."""

    record: bytes


_TO_REPLICA = msgspec.msgpack.Decoder(Plan | Work | Stop)
_FROM_REPLICA = msgspec.msgpack.Decoder(Report | Stopped | Closed)
_pack = msgspec.msgpack.Encoder().encode


def held_blocks(engine: Engine, prefixes: Sequence[Sequence[bytes]]) -> Held:
    """What this replica holds of each prefix; no I/O."""
    found = []
    for keys in prefixes:
        on_device = engine.cache.num_on_device(keys) if engine.is_loaded else 0
        stored = engine.store.nearest(keys[on_device:]) if engine.store else []
        counts = {"device": on_device, "host": stored.count("host"), "local": stored.count("local")}
        found.append([counts[place] for place in PLACES])
    return found


class Router:
    """All replicas as one engine: work goes in once, answers come out step by step."""

    def __init__(self, engine: Engine, world: World) -> None:
        """`engine` is this process's own replica."""
        self._engine, self._world = engine, world
        self._others = {number: Mailbox(world.roots, number, world.watch) for number in range(1, world.num_replicas)}
        self._ready: set[int] = set()
        self._silent = set(self._others)
        """Have not yet said what they hold."""
        self._stopped: set[int] = set()
        self._subtrees: Sequence[Subtree] = ()
        self._placement: Placement | None = None
        self._requests: Sequence[Request] = ()
        self._places: dict[str, tuple[int, int, int]] = {}
        """Of a request that was sent out: replica, subtree, cost."""
        self._num_sent = [0] * world.num_replicas
        self._open: dict[int, int] = {}
        """Answers to come of each subtree that was sent out."""
        self.num_unanswered = 0
        self.records: list[dict[str, Any]] = []
        """Of every replica, once they are closed."""

    def start(
        self,
        requests: Sequence[Request],
        subtrees: Sequence[Subtree],
        sessions: Sequence[str | None],
        max_tokens_in_use: int,
    ) -> None:
        """Have every replica load the model; `subtrees` name requests by their place in `requests`."""
        weights, block_tokens = self._engine.rank.parallel.routing, self._engine.cache_config.block_tokens
        self._requests, self._subtrees, self.num_unanswered = requests, subtrees, len(requests)
        self._placement = Placement(subtrees, sessions, self._world.num_replicas, weights, block_tokens)
        plan = _pack(Plan([list(subtree.prefix) for subtree in subtrees], max_tokens_in_use))
        for mailbox in self._others.values():
            mailbox.post(plan)
        self._placement.note_held(0, self._own_held())
        self._engine.load(max_tokens_in_use)
        self._ready.add(0)

    def step(self) -> list[Answer]:
        """Give out what there is room for, compute here, take in what has come."""
        self._hand_out()
        answers = self._engine.step() if self._engine.num_unfinished else []
        found = [(0, answer) for answer in answers] + list(self._hear())
        for replica, answer in found:
            self._note(replica, answer)
        if not found and not self._engine.num_unfinished:
            time.sleep(_NAP_S)
        return [answer for _, answer in found]

    def stop(self) -> list[Answer]:
        """Drop what is unfinished, everywhere; the answers that were on their way."""
        for mailbox in self._others.values():
            mailbox.post(_pack(Stop()))
        self._engine.abort_all()
        deadline = time.monotonic() + self._world.watch.deadline_s
        answers = []
        while len(self._stopped) < len(self._others) and time.monotonic() < deadline:
            answers += [answer for _, answer in self._hear()]
            time.sleep(_NAP_S)
        self._warn_of({*self._others} - self._stopped, "stopped; their last answers are computed again next time")
        return answers

    def close(self) -> None:
        """After the own engine is closed: until the others have sealed their stores, too."""
        self.records.append({"replica": 0, **engine_record(self._engine)})
        deadline = time.monotonic() + self._world.watch.deadline_s
        while not all(mailbox.is_ended for mailbox in self._others.values()) and time.monotonic() < deadline:
            list(self._hear())
            time.sleep(_NAP_S)
        self._warn_of({n for n, mailbox in self._others.items() if not mailbox.is_ended}, "closed their stores")
        for mailbox in self._others.values():
            mailbox.close()
            mailbox.flush()
        self.records.sort(key=lambda record: int(record["replica"]))

    def _warn_of(self, late: set[int], what: str) -> None:
        if late:
            numbers = ", ".join(map(str, sorted(late)))
            _log.warning("replicas %s have not %s", numbers, what)

    def _own_held(self) -> Held:
        return held_blocks(self._engine, [subtree.prefix for subtree in self._subtrees])

    def _hand_out(self) -> None:
        """One subtree after another, to the least busy that has room."""
        if self._placement is None or self._silent:
            return
        while self._placement.num_left:
            with_room = [replica for replica in self._placement.by_queue() if self._has_room(replica)]
            if not with_room:
                return
            self._send(with_room[0])

    def _has_room(self, replica: int) -> bool:
        """Whether it can use more now; as long as others are still loading, no more than its even share."""
        assert self._placement
        if replica not in self._ready:
            return False
        if len(self._ready) <= len(self._others) and self._placement.given[replica] >= self._placement.even_share:
            return False
        return not self._others or self._num_sent[replica] < _QUEUED_BATCHES * self._engine.config.max_requests

    def _send(self, replica: int) -> None:
        assert self._placement
        number = self._placement.take(replica)
        subtree = self._subtrees[number]
        requests = [self._requests[n] for n in subtree.prompts]
        for request, cost in zip(requests, subtree.costs, strict=True):
            self._places[request.request_id] = replica, number, cost
        self._num_sent[replica] += len(requests)
        self._open[number] = len(requests)
        if replica:
            self._others[replica].post(_pack(Work(number, requests)))
        else:
            for request in requests:
                self._engine.add(request)

    def _hear(self) -> Iterator[tuple[int, Answer]]:
        """Answers of the other replicas."""
        for number, mailbox in self._others.items():
            while (raw := mailbox.poll()) is not None:
                message = _FROM_REPLICA.decode(raw)
                match message:
                    case Report(answers, held, is_ready):
                        if held is not None and self._placement:
                            self._placement.note_held(number, held)
                            self._silent.discard(number)
                        if is_ready:
                            self._ready.add(number)
                        for answer in answers:
                            yield number, answer
                    case Stopped():
                        self._stopped.add(number)
                    case Closed(record):
                        self.records.append({"replica": number, **msgspec.json.decode(record)})

    def _note(self, replica: int, answer: Answer) -> None:
        assert self._placement
        _, number, cost = self._places.pop(answer.request_id)
        self._placement.note_done(replica, cost)
        self._num_sent[replica] -= 1
        self.num_unanswered -= 1
        self._open[number] -= 1
        if replica == 0 and not self._open[number] and self._placement.num_left:
            self._placement.note_held(0, self._own_held())


class _Worker:
    """Another replica's side: computes what the router sends."""

    def __init__(self, engine: Engine, world: World) -> None:
        self._engine = engine
        self._mailbox = Mailbox(world.roots, 0, world.watch)
        self._prefixes: list[list[bytes]] = []
        self._subtree_of: dict[str, int] = {}
        self._left: dict[int, int] = {}
        """Requests to answer of each subtree."""

    def run(self) -> None:
        """Until the router says stop."""
        awake = time.monotonic()
        while True:
            raw = self._mailbox.poll()
            message = _TO_REPLICA.decode(raw) if raw is not None else None
            if isinstance(message, Stop):
                break
            if isinstance(message, Plan):
                self._load(message)
            elif isinstance(message, Work):
                self._take(message)
            if self._engine.num_unfinished:
                awake = time.monotonic()
                self._report(self._engine.step())
            elif message is None:
                time.sleep(_NAP_S)
                if self._engine.is_loaded and time.monotonic() - awake > _KEEP_ALIVE_S:
                    self._engine.executor.wait_for_blocks(None)  # its other ranks wait for a step
                    awake = time.monotonic()
        self._engine.abort_all()
        self._post(Stopped())

    def close(self) -> None:
        """After the engine is closed: the last word, and the router's."""
        self._post(Closed(msgspec.json.encode(engine_record(self._engine))))
        self._mailbox.close()
        while not self._mailbox.is_ended:
            self._mailbox.poll()
            time.sleep(_NAP_S)
        self._mailbox.flush()

    def _load(self, plan: Plan) -> None:
        self._prefixes = plan.prefixes
        self._post(Report(held=held_blocks(self._engine, self._prefixes)))
        self._engine.load(plan.max_tokens_in_use)
        self._post(Report(is_ready=True))

    def _take(self, work: Work) -> None:
        self._left[work.number] = len(work.requests)
        refused = []
        for request in work.requests:
            self._subtree_of[request.request_id] = work.number
            try:
                self._engine.add(request)
            except CapacityError as error:  # the router's GPU has more memory than this one
                refused.append(Answer(request.request_id, [], Usage(len(request.prompt_ids), 0, {}), str(error)))
        self._report(refused)

    def _report(self, answers: list[Answer]) -> None:
        if not answers:
            return
        is_subtree_over = False
        for answer in answers:
            number = self._subtree_of.pop(answer.request_id)
            self._left[number] -= 1
            is_subtree_over |= not self._left[number]
        self._post(Report(answers, held_blocks(self._engine, self._prefixes) if is_subtree_over else None))

    def _post(self, message: Report | Stopped | Closed) -> None:
        self._mailbox.post(_pack(message))


def answer_for_router(engine: Engine, world: World) -> None:
    """Another replica's rank 0: compute what the router sends, until it says stop."""
    worker = _Worker(engine, world)
    with engine:  # whatever happens, what was computed is sealed
        worker.run()
    worker.close()
