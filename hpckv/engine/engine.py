"""The engine: requests in, answers out, one forward a step. Everything of one process that shares one model and one cache."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import torch

from hpckv.comm import ParallelConfig, World
from hpckv.engine.audit import StepAudit
from hpckv.engine.config import EngineConfig
from hpckv.engine.executor import Coordinator, Executor, Flight, LocalExecutor
from hpckv.engine.limits import Limits
from hpckv.engine.metering import EngineMeter
from hpckv.engine.prompts import NO_STORE_KEY, Prompt, PromptReader
from hpckv.engine.rank import Rank
from hpckv.engine.request import Answer, Request, RequestState, RunningSequence, SamplingParams, seed_of
from hpckv.engine.runner import Runner
from hpckv.engine.sampler import Sampled
from hpckv.engine.scheduler import Scheduler, StepPlan
from hpckv.engine.sizing import PagePlan
from hpckv.engine.step import StepTimes
from hpckv.engine.stopping import Stopping
from hpckv.errors import CapabilityError, ConfigError
from hpckv.kvcache import CacheConfig, CacheManager
from hpckv.kvcache.load_policy import LoadPolicy
from hpckv.model import ModelSettings
from hpckv.model.tokenizer import Tokenizer
from hpckv.store import StoreConfig
from hpckv.store.audit import Auditor

_READ_AHEAD_BYTES = 512 * 1024**2
"""Of stored blocks, on their way to sequences whose turn has not come."""


@dataclass(frozen=True)
class _Loaded:
    """What exists only once the weights are in memory."""

    executor: Executor
    cache: CacheManager
    scheduler: Scheduler
    audit: StepAudit | None


class Engine:
    """A model with its cache and, if given, its store.

    with Engine(model="models/llama-3.1-8b", store="/lustre/proj/kv") as engine:
        for answer in engine.generate(prompts, SamplingParams(max_tokens=64)):
            print(answer.text, answer.usage.cached_tokens)
    """

    def __init__(
        self,
        model: str | Path | ModelSettings,
        *,
        store: str | Path | StoreConfig | None = None,
        cache: CacheConfig | None = None,
        engine: EngineConfig | None = None,
        parallel: ParallelConfig | None = None,
        world: World | None = None,
        run_directory: Path | None = None,
    ) -> None:
        """Check model, machine and store; the weights are loaded on first use or by `load()`.

        `store` is a folder or a whole `StoreConfig`. `run_directory` names the run in the ledger. In a `world` of several ranks
        this is rank 0 of its replica, and the others `serve`. Raises `ModelError`, `CapabilityError`, `StoreError`.
        """
        settings = model if isinstance(model, ModelSettings) else ModelSettings(path=str(model))
        if store is not None and not isinstance(store, StoreConfig):
            store = StoreConfig(shared=str(store))
        self.rank = Rank(
            settings,
            store=store,
            cache=cache or CacheConfig(),
            engine=engine or EngineConfig(),
            parallel=parallel or ParallelConfig(),
            world=world or World.single(),
        )
        self.settings, self.cache_config, self.config = settings, self.rank.cache_config, self.rank.config
        self.model_config, self.store = self.rank.model_config, self.rank.store
        self._writes = store.write if store else "off"
        self.prompts = PromptReader(
            Path(settings.path),
            self.cache_config.block_tokens,
            epoch_key=self.store.epoch_key if self.store else NO_STORE_KEY,
            identity=self.store.identity if self.store else NO_STORE_KEY,
        )
        self.times = StepTimes()
        self.load_policy = LoadPolicy()
        self._states: dict[str, RequestState] = {}
        self._flights: deque[Flight] = deque()
        self._loaded: _Loaded | None = None
        self._is_closed = False
        self._meter = EngineMeter(self, run_directory)

    def load(self, max_tokens_in_use: int | None = None) -> None:
        """Load the weights and take the pages; done on first use if not called. Raises `ModelError`.

        `max_tokens_in_use` bounds the pages by what the run can use at most.
        """
        if self._loaded:
            return
        most = None if max_tokens_in_use is None else self.pages.at_most(max_tokens_in_use).num_pages
        self.rank.load(most)
        executor = (LocalExecutor if self.rank.world.is_single else Coordinator)(self.rank, self.load_policy)
        cache = CacheManager(
            self.pages.num_pages,
            self.cache_config.block_tokens,
            self.prompts.key_after,
            connector=executor.connector,
            writes=self._writes,
            reuse=self.cache_config.reuse,
        )
        geometry = self.pages.geometry
        scheduler = Scheduler(
            self.config,
            cache,
            num_micro_batches=executor.num_in_flight,
            read_ahead_tokens=_READ_AHEAD_BYTES * geometry.block_tokens // geometry.block_bytes,
        )
        auditor, pool = self._auditor, self.rank.pool
        audit = StepAudit(auditor, self.store, pool, scheduler) if self.store and auditor and pool else None
        self._loaded = _Loaded(executor, cache, scheduler, audit)
        self._meter.start()

    @property
    def _auditor(self) -> Auditor | None:
        """A rank alone has whole blocks to compare."""
        return self.store.auditor if self.store and self.rank.world.is_single else None

    @property
    def pages(self) -> PagePlan:
        return self.rank.pages

    @property
    def saved_gpu_s(self) -> float:
        """GPU seconds that caches have saved so far, as the ledger counts them."""
        return self._meter.sample().saved_gpu_s

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    @property
    def runner(self) -> Runner:
        self.load()
        return self.rank.runner

    @property
    def executor(self) -> Executor:
        self.load()
        assert self._loaded
        return self._loaded.executor

    @property
    def cache(self) -> CacheManager:
        self.load()
        assert self._loaded
        return self._loaded.cache

    @property
    def scheduler(self) -> Scheduler:
        self.load()
        assert self._loaded
        return self._loaded.scheduler

    @cached_property
    def _stopping(self) -> Stopping:
        return Stopping(self.model_config, self.tokenizer)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, or None if its folder has none."""
        return self.prompts.tokenizer

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, a chat, or token ids as they are."""
        return self.prompts.ids_of(prompt)

    @cached_property
    def limits(self) -> Limits:
        """What requests may be; settled before the weights are loaded."""
        held = self.pages.num_usable * self.cache_config.block_tokens
        return Limits(
            self.model_config.max_positions,
            self.model_config.vocab_size,
            held,
            has_tokenizer=self.tokenizer is not None,
        )

    def add(self, request: Request) -> None:
        """Queue a request; raises `CapacityError` if it can never be answered, `ConfigError` for an id in use."""
        self.limits.check(request)
        if request.request_id in self._states:
            raise ConfigError(f"request id {request.request_id!r} is already queued")
        keys = list(request.keys) if request.keys is not None else self.prompts.keys_of(request.prompt_ids)
        state = self._states[request.request_id] = RequestState(request)
        auditor = self._auditor
        for index in range(request.params.n):
            seq = RunningSequence(request, index, list(keys), seed_of(request, index, self.config.seed))
            state.sequences.append(seq)
            seq.is_audit = index == 0 and auditor is not None and auditor.wants(request.request_id)
            self.cache.expect(keys)
            self.scheduler.add(seq)

    @property
    def bridged_blocks(self) -> int:
        """Stored blocks that were used although they had been computed in another dtype."""
        return self._loaded.cache.stats.bridged if self._loaded else 0

    @property
    def num_unfinished(self) -> int:
        """Sequences not yet finished."""
        return self._loaded.scheduler.num_unfinished if self._loaded else 0

    def step(self) -> list[Answer]:
        """Compute until one more plan is through; the answers it finished."""
        self.load()
        assert self._loaded
        start, waited = time.perf_counter(), self.times.load_s
        audit, executor = self._loaded.audit, self._loaded.executor
        for seq in audit.restart_if_needed(self._states.values()) if audit else ():
            self._stopping.forget(seq)
        while len(self._flights) < executor.num_in_flight:
            executor.note_loads()
            plan = self.scheduler.next_step()
            if plan.chunks:
                self.times.schedule_s += time.perf_counter() - start - (self.times.load_s - waited)
                start, waited = time.perf_counter(), self.times.load_s
                self._flights.append(self._start(executor, plan))
                start = time.perf_counter()
            elif not self._flights and (loading := self.scheduler.loading):
                begun = time.perf_counter()
                executor.wait_for_blocks(loading[0].fetch)
                self.times.load_s += time.perf_counter() - begun
            else:
                break
        if not self._flights:
            return []
        return self._land(self._flights.popleft())

    def _start(self, executor: Executor, plan: StepPlan) -> Flight:
        begun = time.perf_counter()
        try:
            flight = executor.start(plan)
        except BaseException as error:
            self.rank.world.watch.is_broken = True  # the others wait in the middle of this step
            if isinstance(error, torch.OutOfMemoryError):
                text = "the GPU's memory is full; lower cache.device_memory or engine.max_batch_tokens"
                raise CapabilityError(text) from None
            raise
        taken = time.perf_counter() - begun
        self.times.note_forward(plan, taken)
        if plan.num_prompt_tokens >= plan.num_tokens / 2:
            self.load_policy.note_prefill(plan.num_prompt_tokens, taken)
        return flight

    def _land(self, flight: Flight) -> list[Answer]:
        """Wait for a flight and take in what it sampled."""
        begun = time.perf_counter()
        sampled = flight.result()
        landed = time.perf_counter()
        self.scheduler.complete(flight.plan)
        if self._loaded and self._loaded.audit:
            self._loaded.audit.note_step(flight.plan)
        answers = self._append_sampled(flight.plan, sampled)
        self.times.note_forward(flight.plan, landed - begun)
        self.times.sample_s += time.perf_counter() - landed
        return answers

    def generate(self, prompts: Iterable[Prompt], params: SamplingParams | None = None) -> Iterator[Answer]:
        """Answer every prompt, yielding in the order of `prompts`. Works through prefixes that prompts share once."""
        params = params or SamplingParams()
        ids = [self.prompts.ids_of(prompt) for prompt in prompts]
        # Depth first through the prefix tree: equal beginnings become neighbours.
        order = sorted(range(len(ids)), key=lambda n: ids[n])
        requests = [Request(str(number), ids[number], params, place) for place, number in enumerate(order)]
        for request in requests:
            self.limits.check(request)
        try:
            for request in requests:
                self.add(request)
            ready: dict[str, Answer] = {}
            for number in range(len(ids)):
                while str(number) not in ready:
                    ready.update((answer.request_id, answer) for answer in self.step())
                yield ready.pop(str(number))
        finally:  # the caller may have stopped early
            self.abort_all()

    @property
    def unstarted(self) -> list[str]:
        """Ids of requests of which nothing has been computed, in the plan's order."""
        waiting = set(self._loaded.scheduler.unstarted) if self._loaded else set()
        states = [state for state in self._states.values() if waiting.issuperset(state.sequences)]
        return [state.request.request_id for state in sorted(states, key=lambda state: state.request.order)]

    def withdraw(self, request_ids: Iterable[str]) -> None:
        """Forget requests that are `unstarted`."""
        for name in request_ids:
            self.scheduler.remove(self._states.pop(name).sequences)

    def abort_all(self) -> None:
        """Forget every unfinished request; their complete blocks stay in cache and store."""
        if not self._loaded:
            return
        while self._flights:
            flight = self._flights.popleft()
            flight.result()
            self.scheduler.complete(flight.plan)
        self.scheduler.drop_unstarted()
        for seq in list(self.scheduler.running):
            self.scheduler.finish(seq)
        self._states.clear()
        self._stopping.clear()

    def close(self) -> None:
        """Seal what the store still holds open; idempotent. In a world of several ranks the others end too."""
        if not self._is_closed:
            self._is_closed = True
            if self.rank.world.watch.is_broken:
                pass  # the others are gone, or will be
            elif self._loaded:
                self.abort_all()
                self._loaded.executor.finish()
            elif not self.rank.world.is_single:
                self.rank.load(0)
        self.rank.close()
        self._meter.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append_sampled(self, plan: StepPlan, sampled: Sequence[Sampled]) -> list[Answer]:
        sequences = [chunk.seq for chunk in plan.chunks if chunk.samples]
        for seq, found in zip(sequences, sampled, strict=True):
            if seq.finish_reason:  # a sibling failed meanwhile
                continue
            if not found.is_finite:  # an answer drawn from these would be silently wrong
                where = f"at position {len(seq.tokens)} (overflow in {self.rank.dtype_name}?)"
                self._fail(seq, f"the logits are not finite {where}")
                continue
            seq.tokens.append(found.token)
            if found.logprob is not None:
                seq.logprobs.append(found.logprob)
            self._stopping.check(seq, found.token)
        return self._collect([chunk.seq for chunk in plan.chunks])

    def _fail(self, seq: RunningSequence, reason: str) -> None:
        state = self._states[seq.request.request_id]
        state.error = state.error or reason
        for sibling in state.sequences:
            sibling.finish_reason = sibling.finish_reason or "error"
            self._stopping.forget(sibling)

    def _collect(self, sequences: Sequence[RunningSequence]) -> list[Answer]:
        """Take finished sequences out; the answers that are complete by that."""
        finished = [seq for seq in sequences if seq.finish_reason]
        siblings = [
            sibling
            for seq in finished
            if (state := self._states.get(seq.request.request_id)) and state.error
            for sibling in state.sequences
        ]
        # What is in flight is taken out when it lands.
        self.scheduler.remove([s for s in dict.fromkeys(finished + siblings) if not self.scheduler.is_in_flight(s)])
        names = dict.fromkeys(seq.request.request_id for seq in finished)
        complete = [name for name in names if name in self._states and self._states[name].is_finished]
        states = [self._states.pop(name) for name in complete]
        answers = [state.answer() for state in states]
        for state, answer in zip(states, answers, strict=True):
            self._meter.count(answer, state.sequences[0].by_writer)
        return answers
