#!/usr/bin/env python3
"""Train the small Llama-architecture model that the demo runs: recall from a long catalogue.

    python examples/train_recall.py --minutes 22 --held-out 400

A curriculum of length: the next stage begins whenever held-out accuracy on single look-ups passes 97 %;
the loss is taken on the answers only. Writes a Hugging Face folder.
Self-contained on purpose: the decoder here shares no line with `hpckv`, which must agree with it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from recall_task import ADJECTIVES, ANIMALS, PLACES, Catalogue, Key, conversation, make_catalogue
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '<|assistant|> ' + message['content'] | trim + '<|end|>' }}"
    "{%- else -%}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN, CONTEXT = 128, 4, 4, 2, 64, 384, 2048
THETA = 500000.0


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE; every word of the task becomes one token, any other text still encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [" " + w for w in ADJECTIVES + ANIMALS + PLACES + ["see", "is", "the", "from", "catalogue"]]
    corpus = words * 50 + ["Where", "Answer"] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=1280,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return tokenizer


Row = tuple[list[int], list[int]]
"""Token ids of a conversation, and 1 for each on which the loss is taken."""

_WORDS = re.compile(r" ?[A-Za-z]+|[^ A-Za-z]")


class Encoder:
    """Text of the task to ids by a table of its words (checked against the tokenizer at start)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        self.places = {self.piece(" " + place)[0] for place in PLACES}
        probe = make_catalogue(random.Random(0), 40)
        chat = list(conversation(probe, probe.keys(1)[:2] + probe.keys(2)[:1]))
        rendered = "".join(f"<|{r}|>{' ' if r == 'assistant' else ''}{c}<|end|>" for r, c in chat)
        assert self.chat(chat)[0] == tokenizer.encode(rendered, add_special_tokens=False).ids

    def piece(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.cache[text]

    def chat(self, turns: list[tuple[str, str]]) -> Row:
        """(ids, 1 where the token belongs to an answer)."""
        ids: list[int] = []
        mask: list[int] = []
        for role, content in turns:
            ids += self.piece(f"<|{role}|>")
            mask.append(0)
            text = " " + content if role == "assistant" else content
            body = [i for part in _WORDS.findall(text) for i in self.piece(part)]
            body += self.piece("<|end|>")
            ids += body
            mask += [int(role == "assistant")] * len(body)
        return ids, mask


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, eps=1e-5)
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.gate_proj = nn.Linear(HIDDEN, FFN, bias=False)
        self.up_proj = nn.Linear(HIDDEN, FFN, bias=False)
        self.down_proj = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        h = self.input_layernorm(x)
        q, k, v = (
            p(h).view(batch, length, -1, HEAD_DIM).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(a.transpose(1, 2).reshape(batch, length, -1))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = HEAD_DIM // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Recall(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-5)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # Layers must start small beside the embedding, or they drown it and matching is learnt late.
                scale = 1 / math.sqrt(2 * LAYERS) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(p, 0.0, 0.1 if "embed" in name else scale / math.sqrt(p.shape[1]))
        self.start_as_induction()
        inv = THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angle = torch.outer(torch.arange(CONTEXT).float(), torch.cat((inv, inv)))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    @torch.no_grad()
    def start_as_induction(self) -> None:
        """Start near the circuit that look-ups need, and let training do the rest.

        From a random start nothing is learnt for hours here: heads that look back are of no use before there are heads
        that match, nor these before those. So the first layer's heads begin by attending 1, 2, 3 and 1 tokens back and
        writing down a random code of what they see; the second layer's begin by matching (this word, the word before)
        against (1 back, 2 back), and by copying what they find.
        """
        basis = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN)).Q.T
        common, code, one_back, two_back, copied = basis.split([1, 16, 16, 16, 79])
        self.embed_tokens.weight.add_(1.1 * common)
        half, fast = HEAD_DIM // 2, 8
        first, second = self.layers[0], self.layers[1]
        angle = THETA ** (-torch.arange(half) / half)
        key = torch.zeros(HEAD_DIM)
        key[:fast] = 6.5
        first.v_proj.weight.mul_(0.1)
        first.o_proj.weight.mul_(0.1)
        for kv in range(KV_HEADS):
            at = kv * HEAD_DIM
            first.k_proj.weight[at : at + HEAD_DIM] = torch.outer(key, common[0] / math.sqrt(HIDDEN / 2))
            first.v_proj.weight[at : at + 16] = 0.35 * code
            # On the slow rotations, so that distance matters little.
            second.k_proj.weight[at + 16 : at + 32] = 1.4 * one_back
            second.k_proj.weight[at + 48 : at + 64] = 1.3 * two_back
            second.v_proj.weight[at : at + HEAD_DIM] = copied[:HEAD_DIM]
        for head, back in enumerate((1, 2, 3, 1)):
            at = head * HEAD_DIM
            query = torch.cat((key[:half] * (back * angle).cos(), -key[:half] * (back * angle).sin()))
            first.q_proj.weight[at : at + HEAD_DIM] = torch.outer(query, common[0] / math.sqrt(HIDDEN / 2))
            if head < 2:
                first.o_proj.weight[:, at : at + 16] = (one_back, two_back)[head].T
            second.q_proj.weight[at + 16 : at + 32] = 3.0 * code
            second.q_proj.weight[at + 48 : at + 64] = 1.3 * one_back
            second.o_proj.weight[:, at : at + HEAD_DIM] = 0.3 * copied[:HEAD_DIM].T

    def forward(self, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Logits at the positions where `wanted` is true, (n, vocab)."""
        x = self.embed_tokens(ids)
        length = ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return F.linear(self.norm(x[wanted]), self.embed_tokens.weight)


@dataclass(frozen=True)
class Stage:
    """How hard the task is: words of each kind in use (96 is all), tokens of catalogue."""

    words: int
    length: int

    @property
    def questions(self) -> int:
        return max(4, min(24, self.length // 24))


STAGES = [Stage(96, n) for n in (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)]


def sample(encoder: Encoder, rng: random.Random, stage: Stage, questions: int, two_hop: float) -> Row:
    """A catalogue and a chat about it."""
    num_records = max(4, (min(stage.length, CONTEXT - 20 * questions) - 20) * 10 // 41)
    catalogue: Catalogue = make_catalogue(rng, num_records, stage.words)
    pools: dict[int, list[Key]] = {1: catalogue.keys(1), 2: catalogue.keys(2)}
    keys = [rng.choice(pools[2] if pools[2] and rng.random() < two_hop else pools[1]) for _ in range(questions)]
    return encoder.chat(list(conversation(catalogue, keys)))


def drill(encoder: Encoder, rng: random.Random, stage: Stage) -> Row:
    """A catalogue recited in another order, the loss on the places only: every line is a look-up.

    Questions alone are so sparse a signal that matching is not learnt in hours; this teaches it in minutes.
    """
    catalogue = make_catalogue(rng, max(4, (min(stage.length, CONTEXT // 2) - 20) * 10 // 41), stage.words)
    lines = [(key, entry) for key, entry in catalogue.records if isinstance(entry, str)]
    rng.shuffle(lines)
    turns = [("system", catalogue.text()), ("user", "Recite."), ("assistant", Catalogue(tuple(lines)).text())]
    ids, mask = encoder.chat(turns)
    places = encoder.places
    return ids, [int(m and i in places) for i, m in zip(ids, mask, strict=True)]


def pad(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    width = min(CONTEXT, max(len(ids) for ids, _ in rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, wanted) in enumerate(rows):
        n = min(width, len(row))
        ids[i, :n] = torch.tensor(row[:n])
        mask[i, :n] = torch.tensor(wanted[:n], dtype=torch.bool)
    return ids, mask


@torch.no_grad()
def accuracy(model: Recall, encoder: Encoder, stage: Stage, two_hop: float, count: int, seed: int = 10**6) -> float:
    """Share of questions whose every answer token is the argmax; one question a catalogue."""
    rng = random.Random(seed + stage.length)
    right = 0
    for _ in range(0, count, 8):
        ids, mask = pad([sample(encoder, rng, stage, 1, two_hop) for _ in range(8)])
        hit = model(ids[:, :-1], mask[:, 1:]).argmax(-1) == ids[:, 1:][mask[:, 1:]]
        right += sum(int(part.all()) for part in hit.split(mask.sum(1).tolist()))
    return right / (8 * math.ceil(count / 8))


def save(model: Recall, tokenizer: Tokenizer, out: Path, report: dict[str, object]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, p in model.named_parameters():
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = name.replace(f".{part}.", f".self_attn.{part}.")
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = name.replace(f".{part}.", f".mlp.{part}.")
        tensors["model." + name] = p.detach().float().contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    vocab = tokenizer.get_vocab_size()
    end = tokenizer.token_to_id("<|end|>")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "hidden_act": "silu", "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": THETA,
        "rope_scaling": None, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
        "bos_token_id": None, "eos_token_id": end, "pad_token_id": 0,
    }  # fmt: skip
    files: dict[str, object] = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": end, "pad_token_id": 0, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>",
            "model_max_length": CONTEXT, "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
        },
        "training.json": report,
    }  # fmt: skip
    tokenizer.save(str(out / "tokenizer.json"))
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=Path(__file__).parent / "recall-1m")
    ap.add_argument("--minutes", type=float, default=22)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--tokens", type=int, default=4096, help="tokens a step")
    ap.add_argument("--held-out", type=int, default=1000, help="questions behind each held-out figure")
    ap.add_argument("--lr", type=float, default=1e-3)
    args = ap.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = train_tokenizer()
    encoder = Encoder(tokenizer)
    model = Recall(tokenizer.get_vocab_size())
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98)
    )
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {tokenizer.get_vocab_size()}",
        flush=True,
    )

    start, at, step, seen = time.time(), 0, 0, 0
    history: list[dict[str, object]] = []
    while (elapsed := time.time() - start) < args.minutes * 60:
        left = 1 - elapsed / (args.minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * min(1, 0.05 + left / 0.3)
        # Two batches in three at the stage's length, the rest below it, so that short prompts stay right.
        stage = STAGES[at if step % 3 else rng.randrange(at + 1)]
        if step % 2 and stage.length <= 512:
            rows = [drill(encoder, rng, stage) for _ in range(max(2, args.tokens // (2 * stage.length)))]
        else:
            count = max(2, args.tokens // (stage.length + 15 * stage.questions))
            rows = [sample(encoder, rng, stage, stage.questions, 0.2) for _ in range(count)]
        ids, mask = pad(rows)
        loss = F.cross_entropy(model(ids[:, :-1], mask[:, 1:]), ids[:, 1:][mask[:, 1:]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + ids.numel()
        if step % 50 == 0:
            single, two_hop = (accuracy(model, encoder, STAGES[at], share, 128) for share in (0.0, 1.0))
            print(f"{elapsed:6.0f} s  step {step:6d}  {seen / (time.time() - start):6.0f} tok/s  {STAGES[at]}  "
                  f"loss {loss.item():.3f}  single {single:.3f}  two-hop {two_hop:.3f}", flush=True)  # fmt: skip
            if single > 0.97 and at + 1 < len(STAGES):
                history.append({"stage": asdict(STAGES[at]), "step": step, "seconds": round(elapsed), "single": single})
                at += 1
        if step % 250 == 0:
            save(model, tokenizer, args.out, {"finished": False})

    held_out = {
        str(n): {
            "single": accuracy(model, encoder, Stage(96, n), 0.0, args.held_out, 2 * 10**6),
            "two_hop": accuracy(model, encoder, Stage(96, n), 1.0, args.held_out, 3 * 10**6),
        }
        for n in (256, 512, 1024, 2048)
    }
    report = {"finished": True, "seed": args.seed, "minutes": args.minutes, "steps": step, "tokens": seen, "curriculum": history,
              "questions_per_figure": args.held_out, "held_out": held_out}  # fmt: skip
    save(model, tokenizer, args.out, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
