"""Settings of the KV cache on the device (`cache:`)."""

from __future__ import annotations

from typing import Literal

from hpckv.errors import ConfigError
from hpckv.quantity import ByteSize
from hpckv.schema import Config


class CacheConfig(Config, frozen=True):
    """Pages of keys and values on the device."""

    block_tokens: int = 64
    """Tokens in a block: the one granule from the device to the shared filesystem."""
    device_memory: float | str = 0.9
    """Memory for weights and pages: a share of the GPU's, or a size (`24GiB`) for the pages alone. On a CPU the share is
    taken of half the free memory."""
    kv_dtype: Literal["auto", "float32", "float16", "bfloat16", "fp8"] = "auto"
    """Dtype of cached keys and values; `auto` is the model's. Any other is not in this version and is refused."""

    reuse: bool = True
    """Share prefixes at all. `false` computes every prompt by itself, also beside a store: for comparison."""

    def __post_init__(self) -> None:
        if not 1 <= self.block_tokens <= 4096:
            raise ConfigError(f"cache.block_tokens: {self.block_tokens} is not between 1 and 4096")
        if isinstance(self.device_memory, str):
            ByteSize.parse(self.device_memory)
        elif not 0 < self.device_memory <= 1:
            raise ConfigError(
                f"cache.device_memory: {self.device_memory} is neither a share in (0, 1] nor a size such as 24GiB"
            )
