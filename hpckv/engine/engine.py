"""The engine: requests in, answers out, one forward a step. Everything of one process that shares one model and one cache."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from hpckv.attention import make_backend
from hpckv.device import Capability, choose_dtype, probe
from hpckv.device.host_memory import keep_freed_memory
from hpckv.engine.audit import StepAudit
from hpckv.engine.config import EngineConfig
from hpckv.engine.request import Answer, Request, RequestState, RunningSequence, SamplingParams, seed_of
from hpckv.engine.runner import Runner
from hpckv.engine.sampler import Draw, sample
from hpckv.engine.scheduler import Scheduler, StepPlan
from hpckv.engine.sizing import PagePlan, build_namespace, plan_pages
from hpckv.errors import CapabilityError, CapacityError, ConfigError
from hpckv.kvcache import CacheConfig, CacheManager
from hpckv.kvcache.kv_pool import KVPool, StoreConnector
from hpckv.kvcache.load_policy import LoadPolicy
from hpckv.model import ModelConfig, ModelSettings, read_config
from hpckv.model.decoder import Decoder
from hpckv.model.tokenizer import TextStream, Tokenizer
from hpckv.store import ROOT_KEY, StoreConfig, TieredStore, block_key, open_store, prefix_keys

_log = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]

_LOAD_POLL_S = 0.05
_NO_STORE_KEY = bytes(32)
"""Key epoch of a process without a store: its block keys are seen by nobody else."""


@dataclass
class StepTimes:
    """Seconds spent in each part of the steps so far."""

    schedule_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
    load_s: float = 0.0
    """Waiting for stored blocks with nothing to compute meanwhile."""


@dataclass(frozen=True)
class _Loaded:
    """What exists only once the weights are in memory."""

    runner: Runner
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
    ) -> None:
        """Check model, machine and store; the weights are loaded on first use or by `load()`.

        `store` is a folder or a whole `StoreConfig`. Raises `ModelError`, `CapabilityError`, `StoreError`.
        """
        self.settings = model if isinstance(model, ModelSettings) else ModelSettings(path=str(model))
        self.cache_config = cache or CacheConfig()
        self.config = engine or EngineConfig()
        folder = Path(self.settings.path)
        self.model_config: ModelConfig = read_config(folder)
        self.capability: Capability = probe(self.settings.device)
        self.dtype_name = choose_dtype(self.settings.dtype, self.model_config.stored_dtype, self.capability)
        self._refuse_what_is_not_here()
        self.pages: PagePlan = plan_pages(
            self.model_config, folder, self.cache_config, self.capability, self.dtype_name
        )
        self.store: TieredStore | None = None
        self.weights_digest: str | None = None
        self._writes = "off"
        self._epoch_key, self._identity = _NO_STORE_KEY, bytes(32)
        if store is not None:
            self._open_store(store if isinstance(store, StoreConfig) else StoreConfig(shared=str(store)))
        self.times = StepTimes()
        self.load_policy = LoadPolicy()
        self._states: dict[str, RequestState] = {}
        self._streams: dict[RunningSequence, TextStream] = {}
        self._loaded: _Loaded | None = None

    def load(self, max_tokens_in_use: int | None = None) -> None:
        """Load the weights and take the pages; done on first use if not called. Raises `ModelError`.

        `max_tokens_in_use` bounds the pages by what the run can use at most.
        """
        if self._loaded:
            return
        folder, block_tokens = Path(self.settings.path), self.cache_config.block_tokens
        device, dtype = torch.device(self.capability.kind), getattr(torch, self.dtype_name)
        if device.type == "cpu":
            keep_freed_memory()
        if max_tokens_in_use is not None:
            self.pages = self.pages.at_most(max_tokens_in_use)
        backend = make_backend(
            self.config.numerics,
            block_tokens=block_tokens,
            device=device,
            shares_prefixes=self.config.share_prefix_attention,
        )
        buffers = self.store.buffers if self.store else None
        pool = KVPool(self.pages.geometry, num_pages=self.pages.num_pages, dtype=dtype, device=device, buffers=buffers)
        if buffers:  # there is time while the weights are read
            threading.Thread(target=buffers.reserve, name="hpckv-reserve", daemon=True).start()
        decoder = Decoder(self.model_config, folder, backend, dtype=dtype, device=device)
        cache = CacheManager(
            self.pages.num_pages,
            block_tokens,
            lambda parent, tokens: block_key(self._epoch_key, self._identity, parent or ROOT_KEY, tokens),
            connector=StoreConnector(pool, self.store, self.load_policy) if self.store else None,
            writes=self._writes,
            reuse=self.cache_config.reuse,
        )
        runner = Runner(decoder, pool, numerics=self.config.numerics)
        scheduler = Scheduler(self.config, cache)
        auditor = self.store.auditor if self.store else None
        audit = StepAudit(auditor, self.store, pool, scheduler) if self.store and auditor else None
        self._loaded = _Loaded(runner, cache, scheduler, audit)

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    @property
    def runner(self) -> Runner:
        self.load()
        assert self._loaded
        return self._loaded.runner

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
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, or None if its folder has none (prompts of token ids still work)."""
        folder = Path(self.settings.path)
        return Tokenizer(folder) if (folder / "tokenizer.json").exists() else None

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, a chat, or token ids as they are."""
        if not isinstance(prompt, str) and all(isinstance(part, int) for part in prompt):
            return [int(part) for part in prompt if isinstance(part, int)]
        if self.tokenizer is None:
            Tokenizer(Path(self.settings.path))  # raises the error that says what is missing
        assert self.tokenizer is not None
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat([part for part in prompt if isinstance(part, dict)])

    def keys_of(self, prompt_ids: Sequence[int]) -> list[bytes]:
        """Keys of a prompt's full blocks."""
        return prefix_keys(self._epoch_key, self._identity, prompt_ids, self.cache_config.block_tokens)

    def check(self, request: Request) -> None:
        """Raise `CapacityError` if the request can never be answered by this engine."""
        length, context = len(request.prompt_ids), self.model_config.max_positions
        if length == 0:
            raise CapacityError("the prompt is empty")
        if length >= context:
            raise CapacityError(f"the prompt has {length} tokens, the model's context is {context}")
        if not all(0 <= i < self.model_config.vocab_size for i in request.prompt_ids):
            raise CapacityError(f"a token id is outside the vocabulary of {self.model_config.vocab_size}")
        if request.params.stop and self.tokenizer is None:
            raise CapacityError("stop strings need the model's tokenizer.json")
        most = min(context, length + request.params.max_tokens)
        held = self.pages.num_usable * self.cache_config.block_tokens
        if most > held:
            raise CapacityError(f"{most} tokens of prompt and answer do not fit the {held} of cache.device_memory")

    def add(self, request: Request) -> None:
        """Queue a request; raises `CapacityError` if it can never be answered, `ConfigError` for an id in use."""
        self.check(request)
        if request.request_id in self._states:
            raise ConfigError(f"request id {request.request_id!r} is already queued")
        keys = list(request.keys) if request.keys is not None else self.keys_of(request.prompt_ids)
        state = self._states[request.request_id] = RequestState(request)
        auditor = self.store.auditor if self.store else None
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
        """Compute one step; the answers it finished."""
        start, waited = time.perf_counter(), self.times.load_s
        audit = self._loaded.audit if self._loaded else None
        for seq in audit.restart_if_needed(self._states.values()) if audit else ():
            self._streams.pop(seq, None)
        plan = self.scheduler.next_step()
        while not plan.chunks and (loading := self.scheduler.loading):
            self._wait_for_load(loading)
            plan = self.scheduler.next_step()
        if not plan.chunks:
            return []
        scheduled = time.perf_counter()
        try:
            logits = self.runner.run(plan)
        except torch.OutOfMemoryError:
            raise CapabilityError(
                "the GPU's memory is full; lower cache.device_memory or engine.max_batch_tokens"
            ) from None
        computed = time.perf_counter()
        self.scheduler.complete(plan)
        if audit:
            audit.note_step(plan)
        answers = self._append_sampled(plan, logits)
        if (
            prompt_tokens := sum(chunk.num_tokens for chunk in plan.chunks if chunk.num_tokens > 1)
        ) >= plan.num_tokens / 2:
            self.load_policy.note_prefill(prompt_tokens, computed - scheduled)
        self.times.schedule_s += scheduled - start - (self.times.load_s - waited)
        self.times.forward_s += computed - scheduled
        self.times.sample_s += time.perf_counter() - computed
        return answers

    def _wait_for_load(self, loading: Sequence[RunningSequence]) -> None:
        """Nothing can be computed until a stored block comes: wait for one, no longer than its deadline."""
        start = time.perf_counter()
        fetch = loading[0].fetch
        if fetch is not None and not fetch.is_done:
            fetch.arrival.clear()
            if not fetch.is_done:
                fetch.arrival.wait(min(_LOAD_POLL_S, fetch.seconds_left + 0.001))
        self.times.load_s += time.perf_counter() - start

    def generate(self, prompts: Iterable[Prompt], params: SamplingParams | None = None) -> Iterator[Answer]:
        """Answer every prompt, yielding in the order of `prompts`. Works through prefixes that prompts share once."""
        params = params or SamplingParams()
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        # Depth first through the prefix tree: equal beginnings become neighbours.
        order = sorted(range(len(ids)), key=lambda n: ids[n])
        requests = [Request(str(number), ids[number], params, place) for place, number in enumerate(order)]
        for request in requests:
            self.check(request)
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

    def abort_all(self) -> None:
        """Forget every unfinished request; their complete blocks stay in cache and store."""
        if not self._loaded:
            return
        self.scheduler.drop_unstarted()
        for seq in list(self.scheduler.running):
            self.scheduler.finish(seq)
        self._states.clear()
        self._streams.clear()

    def close(self) -> None:
        """Seal what the store still holds open; idempotent."""
        if self.store:
            self.store.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append_sampled(self, plan: StepPlan, logits_RV: torch.Tensor) -> list[Answer]:
        sequences = [chunk.seq for chunk in plan.chunks if chunk.samples]
        draws = [Draw(seq.params, seq.seed, len(seq.tokens)) for seq in sequences]
        tokens, logprobs = sample(logits_RV, draws)
        finite = logits_RV.sum(-1).isfinite().tolist()  # one pass: NaN and infinity outlive any sum
        for seq, token, logprob, is_finite in zip(sequences, tokens, logprobs, finite, strict=True):
            if not is_finite:  # an answer drawn from these would be silently wrong
                self._fail(
                    seq, f"the logits are not finite at position {len(seq.tokens)} (overflow in {self.dtype_name}?)"
                )
                continue
            seq.tokens.append(token)
            if logprob is not None:
                seq.logprobs.append(logprob)
            self._check_stop(seq, token)
        return self._collect(sequences)

    def _fail(self, seq: RunningSequence, reason: str) -> None:
        state = self._states[seq.request.request_id]
        state.error = state.error or reason
        for sibling in state.sequences:
            sibling.finish_reason = sibling.finish_reason or "error"
            self._streams.pop(sibling, None)

    def _collect(self, sequences: Sequence[RunningSequence]) -> list[Answer]:
        """Take finished sequences out; the answers that are complete by that."""
        finished = [seq for seq in sequences if seq.finish_reason]
        states = {seq.request.request_id: self._states[seq.request.request_id] for seq in finished}
        for state in states.values():
            self.scheduler.remove(
                state.sequences if state.error else [seq for seq in state.sequences if seq in finished]
            )
        complete = {name: state for name, state in states.items() if state.is_finished}
        for name in complete:
            del self._states[name]
        return [state.answer() for state in complete.values()]

    def _check_stop(self, seq: RunningSequence, token: int) -> None:
        params = seq.params
        ends = () if params.ignore_eos else self.model_config.eos_token_ids
        if token in ends or token in params.stop_token_ids:
            seq.finish_reason = "stop"
        elif seq.num_output_tokens >= params.max_tokens or len(seq.tokens) >= self.model_config.max_positions:
            seq.finish_reason = "length"
        if self.tokenizer is None or not (params.stop or seq.finish_reason):
            return
        if not params.stop:  # nothing to look for on the way: decode once, at the end
            seq.text = self.tokenizer.decode(seq.output_ids)
            return
        stream = self._streams.setdefault(seq, TextStream(self.tokenizer))
        seq.text = stream.text(seq.output_ids)
        found = [at for stop in params.stop if (at := seq.text.find(stop)) >= 0]
        if found:
            seq.text = seq.text[: min(found)]
            seq.finish_reason = "stop"
        if seq.finish_reason:
            del self._streams[seq]

    def _open_store(self, config: StoreConfig) -> None:
        namespace = build_namespace(
            Path(self.settings.path),
            self.model_config,
            self.cache_config,
            self.config,
            self.capability,
            self.dtype_name,
        )
        self.store = open_store(config, namespace, self.pages.geometry)
        self.weights_digest = namespace.identity.weights
        self._writes = config.write
        self._epoch_key, self._identity = self.store.epoch_key, self.store.identity

    def _refuse_what_is_not_here(self) -> None:
        if self.settings.quantization != "none":
            raise CapabilityError(f"model.quantization: {self.settings.quantization} is not in this version of hpckv")
        if self.cache_config.kv_dtype not in ("auto", self.dtype_name):
            raise CapabilityError(
                f"cache.kv_dtype: {self.cache_config.kv_dtype} is not in this version of hpckv; keys and values are "
                f"kept in the model's dtype ({self.dtype_name})"
            )
