#!/usr/bin/env python3
"""Write the benchmarks' subjects: random-weight Llamas in bf16.

`mid`: 99 M parameters, 12 layers, 768 wide, 12 heads, 3 KV heads. `8b`: the shape of Llama 3.1 8B, made on the GPU.

python bench/make_model.py runs/bench/mid-bf16
python bench/make_model.py runs/bench/8b-bf16 --shape 8b
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPES = {
    "mid": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 32000, "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip


def main(folder: Path, shape: str) -> None:
    """Make the checkpoint unless it is there."""
    if (folder / "config.json").exists():
        return
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=8192, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    on_gpu = shape == "8b" and torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    given = parser.parse_args()
    main(given.folder, given.shape)
