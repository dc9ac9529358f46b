"""The decoder of every family: Llama's, with the differences that `ModelConfig` names.

Reads keys and values of earlier tokens from pages and writes its own into them. Holds one tensor rank's share of
one pipeline stage; layers of other stages are simply absent.

Shapes: T packed tokens of any sequences, D model, N heads, K KV heads, H head size, X pool slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from hpckv.attention import AttentionBackend, AttentionPlan, HeadShape
from hpckv.comm import Collectives, ParallelDims, SingleRank
from hpckv.model.config import ModelConfig
from hpckv.model.linear import RowParallel, VocabularyParallel, column_parallel, spans_of
from hpckv.model.norm import RMSNorm
from hpckv.model.rope import apply_rope, rope_table
from hpckv.model.weights import WeightSource

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class StepInput:
    """One forward: what to compute, where its keys and values go, how it attends."""

    positions_T: torch.Tensor
    slots_T: torch.Tensor
    """Pool slot each token's key and value are written to; a token whose page is already complete names the trash slot."""
    plan: AttentionPlan


KVLayers = list[tuple[torch.Tensor, torch.Tensor]]
"""A (keys_XKH, values_XKH) pool for each layer of the stage."""


class Attention:
    """Grouped-query attention over pages."""

    def __init__(self, model: Decoder, source: WeightSource, layer: int) -> None:
        config, dims = model.config, model.dims
        name = f"model.layers.{layer}.self_attn"
        size, heads = config.head_dim, dims.heads(config.num_heads, config.num_kv_heads)
        queries = spans_of(heads.queries, size)
        self.shape = HeadShape(
            num_heads=len(heads.queries),
            num_kv_heads=heads.kv.stop - heads.kv.start,
            head_dim=size,
            scale=config.query_scale,
            softcap=config.attention_softcap,
            window=config.windows[layer],
        )
        self.backend = model.backend
        kv_rows = [slice(heads.kv.start * size, heads.kv.stop * size)]
        self.qkv = column_parallel(
            source,
            [
                (f"{name}.q_proj", config.num_heads * size, queries),
                (f"{name}.k_proj", config.num_kv_heads * size, kv_rows),
                (f"{name}.v_proj", config.num_kv_heads * size, kv_rows),
            ],
            config.hidden_size,
            bias=config.qkv_bias,
        )
        self.out = RowParallel(
            source,
            f"{name}.o_proj",
            (config.hidden_size, config.num_heads * size),
            queries,
            dims,
            model.collectives,
            bias=config.output_bias,
        )
        self.q_norm = RMSNorm(config, source, f"{name}.q_norm", size) if config.has_qk_norm else None
        self.k_norm = RMSNorm(config, source, f"{name}.k_norm", size) if config.has_qk_norm else None

    def __call__(
        self,
        x_TD: torch.Tensor,
        step: StepInput,
        kv: tuple[torch.Tensor, torch.Tensor],
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        s = self.shape
        qkv = self.qkv(x_TD).view(-1, s.num_heads + 2 * s.num_kv_heads, s.head_dim)
        qk, v_TKH = torch.split(qkv, [s.num_heads + s.num_kv_heads, s.num_kv_heads], dim=1)
        if self.q_norm and self.k_norm:
            q, k = torch.split(qk, [s.num_heads, s.num_kv_heads], dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q_TNH, k_TKH = torch.split(apply_rope(qk, cos, sin), [s.num_heads, s.num_kv_heads], dim=1)
        keys_XKH, values_XKH = kv
        keys_XKH.index_copy_(0, step.slots_T, k_TKH)
        values_XKH.index_copy_(0, step.slots_T, v_TKH)
        return self.out(self.backend.attend(q_TNH, keys_XKH, values_XKH, step.plan, s).flatten(1))


class MLP:
    """Gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, model: Decoder, source: WeightSource, layer: int) -> None:
        config = model.config
        name, size = f"model.layers.{layer}.mlp", config.intermediate_size
        own = [model.dims.columns(size, "intermediate size")]
        self.activation = _ACTIVATIONS[config.activation]
        self.gate_up = column_parallel(
            source,
            [(f"{name}.gate_proj", size, own), (f"{name}.up_proj", size, own)],
            config.hidden_size,
            bias=config.mlp_bias,
        )
        self.down = RowParallel(
            source,
            f"{name}.down_proj",
            (config.hidden_size, size),
            own,
            model.dims,
            model.collectives,
            bias=config.mlp_bias,
        )

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x_TD).chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up))


class DecoderLayer:
    """Attention and MLP, each normed before (and in Gemma 2 also after) and added to the stream."""

    def __init__(self, model: Decoder, source: WeightSource, layer: int) -> None:
        config, name = model.config, f"model.layers.{layer}"

        def norm(part: str) -> RMSNorm:
            return RMSNorm(config, source, f"{name}.{part}", config.hidden_size)

        self.attention = Attention(model, source, layer)
        self.mlp = MLP(model, source, layer)
        self.before_attention = norm("input_layernorm")
        self.after_attention = norm("post_attention_layernorm") if config.has_post_norms else None
        self.before_mlp = norm("pre_feedforward_layernorm" if config.has_post_norms else "post_attention_layernorm")
        self.after_mlp = norm("post_feedforward_layernorm") if config.has_post_norms else None

    def __call__(
        self,
        x_TD: torch.Tensor,
        step: StepInput,
        kv: tuple[torch.Tensor, torch.Tensor],
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        h = self.attention(self.before_attention(x_TD), step, kv, cos, sin)
        x_TD = x_TD + (self.after_attention(h) if self.after_attention else h)
        h = self.mlp(self.before_mlp(x_TD))
        return x_TD + (self.after_mlp(h) if self.after_mlp else h)


class Decoder:
    """One rank's part of the model."""

    def __init__(
        self,
        config: ModelConfig,
        folder: Path,
        backend: AttentionBackend,
        *,
        dtype: torch.dtype,
        device: torch.device,
        dims: ParallelDims | None = None,
        collectives: Collectives | None = None,
    ) -> None:
        """Load this rank's weights from `folder`; raises `ModelError` naming a missing or left-over tensor."""
        self.config, self.backend = config, backend
        self.dtype, self.device = dtype, device
        self.dims = dims or ParallelDims()
        self.collectives = collectives or SingleRank()
        source = WeightSource(folder, dtype=dtype, device=device)
        vocabulary = (config.vocab_size, config.hidden_size)
        is_first, is_last = self.dims.is_first_stage, self.dims.is_last_stage
        embedding, head = "model.embed_tokens", "lm_head"
        if config.tie_embeddings:
            head = embedding
        self.embedding = self.head = None
        if is_first or (is_last and config.tie_embeddings):
            self.embedding = VocabularyParallel(source, embedding, vocabulary, self.dims, self.collectives)
        self.layers = [DecoderLayer(self, source, i) for i in self.dims.layers(config.num_layers)]
        self.norm = RMSNorm(config, source, "model.norm", config.hidden_size) if is_last else None
        if is_last:
            tied = config.tie_embeddings
            self.head = (
                self.embedding if tied else VocabularyParallel(source, head, vocabulary, self.dims, self.collectives)
            )
        source.finish(unused=self._others_tensors)
        cos, sin = rope_table(config, device)
        self.cos, self.sin = cos.to(dtype), sin.to(dtype)

    def _others_tensors(self, name: str) -> bool:
        """Whether a tensor is left to other stages, or stands for the tied embedding."""
        if name == "lm_head.weight":
            return self.config.tie_embeddings or self.head is None
        layer = name.removeprefix("model.layers.").split(".")[0]
        if name.startswith("model.layers.") and layer.isdigit():
            own = self.dims.layers(self.config.num_layers)
            return int(layer) < self.config.num_layers and int(layer) not in own
        return (name == "model.norm.weight" and self.norm is None) or (
            name == "model.embed_tokens.weight" and self.embedding is None
        )

    @property
    def windows(self) -> frozenset[int | None]:
        return frozenset(layer.attention.shape.window for layer in self.layers)

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """What enters the first layer, (T, D)."""
        assert self.embedding is not None
        x_TD = self.embedding.embed(ids_T)
        if self.config.embedding_scale != 1.0:
            x_TD = x_TD * torch.tensor(self.config.embedding_scale, dtype=x_TD.dtype)
        return x_TD

    def forward(self, x_TD: torch.Tensor, step: StepInput, kv: KVLayers) -> torch.Tensor:
        """The stream after this stage's layers, normed behind the last: (T, D)."""
        cos, sin = self.cos[step.positions_T], self.sin[step.positions_T]
        for layer, pools in zip(self.layers, kv, strict=True):
            x_TD = layer(x_TD, step, pools, cos, sin)
        return self.norm(x_TD) if self.norm else x_TD

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """This rank's part of the vocabulary from id `head.first` on, (T, V / tp) in fp32, soft-capped where the family does."""
        assert self.head is not None
        logits = self.head.logits(x_TD).float()
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap is not None else logits
