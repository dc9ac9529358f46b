"""What a decoder is built from: one frozen record for every family. No torch; `families.py` fills it from `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hpckv.schema import Config


class ModelSettings(Config, frozen=True):
    """Which model, and how it is computed (`model:`)."""

    path: str
    """Hugging Face folder: `config.json`, safetensors, `tokenizer.json`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of weights and arithmetic; `auto` takes the checkpoint's where the hardware has it."""
    quantization: Literal["none", "fp8"] = "none"
    """Weight quantisation applied at load. `fp8` is not in this version and is refused."""
    stage: bool = False
    """Copy the folder onto the node's own disk first, once for all ranks of the node, where it lies on a network filesystem and the
    disk has room. The copy stays for later starts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a CUDA GPU if torch sees one."""


@dataclass(frozen=True)
class RopeScaling:
    """Rotary position embedding: its base and one of the scalings default, linear, dynamic, llama3, yarn."""

    theta: float = 10000.0
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The scaling's own numbers, by Hugging Face's names (`factor`, `low_freq_factor`, `beta_fast`, ...)."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything the decoder's shape and arithmetic depend on."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: RopeScaling
    stored_dtype: str
    activation: str = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    has_qk_norm: bool = False
    has_post_norms: bool = False
    """Gemma 2: the outputs of attention and MLP are normed before they are added."""
    norm_adds_one: bool = False
    """Gemma 2: a norm multiplies by 1 + weight, in fp32."""
    embedding_scale: float = 1.0
    query_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer in tokens, the query's own included; None is full attention."""
    eos_token_ids: tuple[int, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """`config.json` as it is: all of it enters the identity of a block."""

    @property
    def kv_values_per_token(self) -> int:
        """Numbers the KV cache keeps for one token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights, biases and norms; tied embeddings counted once."""
        hidden, heads, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = hidden * (heads + 2 * kv) + heads * hidden
        attention += (heads + 2 * kv) * self.qkv_bias + hidden * self.output_bias
        mlp = 3 * hidden * self.intermediate_size + (2 * self.intermediate_size + hidden) * self.mlp_bias
        norms = (4 if self.has_post_norms else 2) * hidden + 2 * self.head_dim * self.has_qk_norm
        embeddings = self.vocab_size * hidden * (1 if self.tie_embeddings else 2)
        return embeddings + hidden + self.num_layers * (attention + mlp + norms)
