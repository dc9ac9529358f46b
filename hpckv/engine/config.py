"""Settings of the engine (`engine:`)."""

from __future__ import annotations

from typing import Literal

from hpckv.errors import ConfigError
from hpckv.schema import Config


class EngineConfig(Config, frozen=True):
    """How a step is filled, and which arithmetic is promised."""

    max_batch_tokens: int = 8192
    """Most tokens in one forward; a longer prefill is cut into chunks."""
    max_requests: int = 256
    """Most sequences in one forward."""
    chunk_tokens: int = 0
    """Most tokens of one sequence in a forward; 0 is `max_batch_tokens`."""
    numerics: Literal["fast", "strict"] = "fast"
    """`strict`: an answer is bit-for-bit the same with a cold cache, a warm cache, any chunks, any batch mates. Slower."""
    seed: int = 0
    """Enters the sampling of requests that give no seed of their own."""
    share_prefix_attention: bool = True
    """Attend a prefix that several sequences share once for all of them, where that is faster."""

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.{name}: {getattr(self, name)} is not at least 1")
        if self.chunk_tokens < 0:
            raise ConfigError(f"engine.chunk_tokens: {self.chunk_tokens} is negative")
