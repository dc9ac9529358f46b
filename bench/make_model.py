#!/usr/bin/env python3
"""Write the benchmark's subject: a random-weight Llama of 99 M parameters in bf16.

`mid`: 12 layers, 768 wide, 12 heads, 3 KV heads.

python bench/make_model.py runs/bench/mid-bf16
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def main(folder: Path) -> None:
    """Make the checkpoint unless it is there."""
    if (folder / "model.safetensors").exists():
        return
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=3, head_dim=64,
        vocab_size=32000, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.normal_(1.0, 0.05)
            elif "embed" in name:
                p.normal_(0, 0.3)
            else:  # wide queries and keys: near-uniform attention would hide a wrong cache
                p.normal_(0, (1.8 if "q_proj" in name or "k_proj" in name else 1.0) / math.sqrt(p.shape[-1]))
    model.generation_config.eos_token_id = None
    model.to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
