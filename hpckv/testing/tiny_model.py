"""Random-weight checkpoints of every family, made by `transformers`: small, oddly shaped, quick to compare with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")

ROPE_SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
"""One working set of parameters for each rope scaling."""

_SHAPE: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 80,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def make_checkpoint(
    folder: Path, family: str = "llama", *, seed: int = 0, dtype: str = "float32", **changes: Any
) -> Path:
    """Write a checkpoint of `family` with random weights into `folder`; `changes` go into its configuration.

    Queries and keys are drawn wide: near-uniform attention would hide a wrong cache.
    """
    import torch
    import transformers

    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2"}[family]
    settings = {**_SHAPE, **changes}
    if settings["num_attention_heads"] * settings["head_dim"] != settings["hidden_size"] and family == "qwen2":
        settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(seed)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.normal_(0.0 if name.endswith("bias") or family == "gemma2" else 1.0, 0.1)
            elif "embed" in name:
                p.normal_(0, 0.3)
            else:
                p.normal_(0, (1.8 if "q_proj" in name or "k_proj" in name else 1.0) / math.sqrt(p.shape[-1]))
    model.generation_config.eos_token_id = None
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def make_tokenizer(folder: Path, *, vocab_size: int = 307) -> None:
    """Add a byte-level tokenizer and a small chat template to a checkpoint."""
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in special])
    assert tokenizer.get_vocab_size() <= vocab_size
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    config = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
