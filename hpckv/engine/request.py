"""A request, its sampling parameters, its sequences and the answer. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from hpckv.errors import ConfigError
from hpckv.kvcache import HIT_TIERS, CachedSequence
from hpckv.schema import Config


class SamplingParams(Config, frozen=True):
    """How one request is continued (`sampling:` gives defaults, a line's body wins)."""

    max_tokens: int = 256
    """Most tokens to generate."""
    temperature: float = 0.0
    """0 is greedy; above, logits are divided by it before sampling."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities add up to this."""
    top_k: int = 0
    """Sample from so many most probable tokens; 0 is all."""
    seed: int | None = None
    """Same seed, same text, whatever else is in the batch. Without one it is derived from `engine.seed` and the request's id."""
    stop: list[str] = []
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: list[int] = []
    """Tokens that end the answer, beside the model's own end tokens."""
    n: int = 1
    """Independent answers to one prompt."""
    logprobs: int | None = None
    """Give each token's log-probability and so many most probable alternatives (0 to 20)."""
    ignore_eos: bool = False
    """Go on after the model's end tokens, up to `max_tokens`."""

    def __post_init__(self) -> None:
        checks = [
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("n", 1 <= self.n <= 128, "between 1 and 128"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
            ("stop", all(self.stop), "without empty strings"),
        ]
        for name, is_right, expected in checks:
            if not is_right:
                raise ConfigError(f"{name}: {getattr(self, name)} is not {expected}")


@dataclass(frozen=True)
class Request:
    """One prompt with its parameters. `order` is its place in the plan: lower runs earlier."""

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    order: int = 0
    keys: Sequence[bytes] | None = None
    """Keys of the prompt's full blocks, if the plan has computed them."""


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token's log-probability and the most probable alternatives at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer; `cached` by tier and `computed_tokens` add up to `prompt_tokens`."""

    prompt_tokens: int
    completion_tokens: int
    cached: dict[str, int]

    @property
    def cached_tokens(self) -> int:
        return sum(self.cached.values())

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True)
class Completion:
    """One of a request's `n` continuations."""

    index: int
    token_ids: list[int]
    text: str
    finish_reason: str
    """`stop` or `length`."""
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Answer:
    """All continuations of one request, or why there are none."""

    request_id: str
    completions: list[Completion]
    usage: Usage
    error: str | None = None

    @property
    def text(self) -> str:
        """The first continuation's text."""
        return self.completions[0].text if self.completions else ""

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids if self.completions else []


class RunningSequence(CachedSequence):
    """One continuation of a request while it is scheduled."""

    def __init__(self, request: Request, index: int, keys: list[bytes], seed: int) -> None:
        super().__init__(list(request.prompt_ids), keys)
        self._num_prompt_keys = len(keys)
        self.request = request
        self.index = index
        self.seed = seed
        self.order = (request.order, index)
        """Its place in the plan; the scheduler orders equals by arrival."""
        self.arrival = 0
        self.was_admitted = False
        self.highest_computed = 0
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.finish_reason: str | None = None

    def begin_again(self) -> None:
        """Forget everything that was generated."""
        del self.tokens[self.num_prompt_tokens :]
        del self.keys[self._num_prompt_keys :]
        self.logprobs, self.text, self.finish_reason = [], "", None

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


@dataclass
class RequestState:
    """A request's sequences until all have finished."""

    request: Request
    sequences: list[RunningSequence] = field(default_factory=list)
    error: str | None = None
    """Why the request has no answer; ends all its sequences."""

    @property
    def is_finished(self) -> bool:
        return all(seq.finish_reason for seq in self.sequences)

    def answer(self) -> Answer:
        found = (self.sequences[0].cached if self.sequences else None) or Counter[str]()
        cached = {tier: found.get(tier, 0) for tier in HIT_TIERS}
        completions = [
            Completion(
                s.index,
                s.output_ids,
                s.text,
                s.finish_reason or "",
                s.logprobs if s.params.logprobs is not None else None,
            )
            for s in self.sequences
        ]
        usage = Usage(len(self.request.prompt_ids), sum(s.num_output_tokens for s in self.sequences), cached)
        return Answer(self.request.request_id, [] if self.error else completions, usage, self.error)


def seed_of(request: Request, index: int, run_seed: int) -> int:
    """64-bit seed of one continuation: the request's own, or from its id and the run's, so that a restart repeats it."""
    own = request.params.seed
    origin = f"seed {own}" if own is not None else f"run {run_seed} {request.request_id}"
    return int.from_bytes(blake3(f"{origin} {index}".encode()).digest(8), "little")
