"""The table of families: from a Hugging Face `config.json` to a `ModelConfig`. One decoder serves them all.

A family is what differs from Llama, a few lines each. An architecture that is not in the table is refused by
name: a guess would compute wrong answers. Sources: the `modeling_*.py` and `configuration_*.py` of transformers 5.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpckv.errors import AccessError, ModelError
from hpckv.model.config import ModelConfig, RopeScaling

Raw = Mapping[str, Any]

ROPE_SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _llama(raw: Raw) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(raw.get("mlp_bias", False))}


def _mistral(raw: Raw) -> dict[str, Any]:
    return {"windows": (raw.get("sliding_window"),) * raw["num_hidden_layers"]}


def _qwen2(raw: Raw) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _qwen_windows(raw)}


def _qwen3(raw: Raw) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    return {"qkv_bias": bias, "output_bias": bias, "has_qk_norm": True, "windows": _qwen_windows(raw)}


def _gemma2(raw: Raw) -> dict[str, Any]:
    layers = raw["num_hidden_layers"]
    types = raw.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    bias = bool(raw.get("attention_bias", False))
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "has_post_norms": True,
        "norm_adds_one": True,
        "embedding_scale": raw["hidden_size"] ** 0.5,
        "query_scale": raw.get("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": raw.get("attn_logit_softcapping", 50.0),
        "logit_softcap": raw.get("final_logit_softcapping", 30.0),
        "windows": tuple(raw.get("sliding_window", 4096) if t == "sliding_attention" else None for t in types),
        "tie_embeddings": raw.get("tie_word_embeddings", True),
        "head_dim": raw.get("head_dim", 256),
    }


def _qwen_windows(raw: Raw) -> tuple[int | None, ...]:
    layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    if not raw.get("use_sliding_window", False):
        window = None
    first = raw.get("max_window_layers", 28)
    types = raw.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if t == "sliding_attention" else None for t in types)


FAMILIES: dict[str, Callable[[Raw], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma2ForCausalLM": _gemma2,
}
KNOWN_ARCHITECTURES = tuple(FAMILIES)


def read_config(folder: Path) -> ModelConfig:
    """Read `config.json` and `generation_config.json` of a Hugging Face folder; raises `ModelError` naming the file."""
    try:
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such model folder")
    except PermissionError:
        raise AccessError(f"{folder}: permission denied") from None
    raw = _read_json(folder / "config.json")
    generation_file = folder / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.exists() else {}
    try:
        return from_raw(raw, generation)
    except KeyError as error:
        raise ModelError(f"{folder / 'config.json'}: {error.args[0]} is missing") from None
    except (ModelError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from None


def from_raw(raw: Raw, generation: Raw | None = None) -> ModelConfig:
    """A `ModelConfig` from the content of `config.json`; raises `ModelError` or `KeyError`."""
    names = raw.get("architectures") or ["(none named)"]
    family = FAMILIES.get(names[0])
    if family is None:
        raise ModelError(f"architecture {names[0]} is not known; known: {', '.join(KNOWN_ARCHITECTURES)}")
    if raw.get("quantization_config"):
        raise ModelError("quantised checkpoints (quantization_config) are not read by this version")
    heads = raw["num_attention_heads"]
    common: dict[str, Any] = {
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }
    common |= family(raw)
    common.setdefault("query_scale", common["head_dim"] ** -0.5)
    common["windows"] = tuple(common.get("windows") or (None,) * raw["num_hidden_layers"])
    return ModelConfig(
        architecture=names[0],
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        max_positions=raw["max_position_embeddings"],
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope=_rope(raw),
        stored_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        activation=_activation(raw),
        eos_token_ids=_eos(raw, generation or {}),
        raw=raw,
        **common,
    )


def _rope(raw: Raw) -> RopeScaling:
    """Both spellings: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`."""
    given = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    theta = given.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    if kind not in ROPE_SCALINGS:
        raise ModelError(f"rope scaling {kind!r} is not known; known: {', '.join(ROPE_SCALINGS)}")
    for holder in (given, raw):
        if holder.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise ModelError("partial rotary embeddings (partial_rotary_factor) are not read by this version")
    return RopeScaling(theta=float(theta), kind=kind, parameters=given)


def _activation(raw: Raw) -> str:
    name = raw.get("hidden_activation") or raw.get("hidden_act") or "silu"
    if name not in _ACTIVATIONS:
        raise ModelError(f"activation {name!r} is not known; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _eos(raw: Raw, generation: Raw) -> tuple[int, ...]:
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; a model folder has config.json, tokenizer.json and safetensors") from None
    except PermissionError:
        raise AccessError(f"{path}: permission denied") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return content
