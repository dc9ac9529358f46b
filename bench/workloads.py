"""What the benchmarks run: token ids only, the same for every engine.

W1  n prompts that share a prefix of 1,024 tokens, 64 of their own each, 32 generated
W3  n prompts of 512 tokens that share nothing, 64 generated
W4d n prompts of 1,088 tokens that share nothing, 32 generated: what a restart has to save

Full size is n = 32, 16 and 32; `half` 16, 8 and 16; `quarter` 8, 4 and 8; `x8`, for a GPU, 256, 128 and 256.
"""

from __future__ import annotations

import random

LOW, HIGH = 300, 31900
SIZES = {"full": 1, "half": 2, "quarter": 4, "x8": 1 / 8}


def get(name: str) -> dict:
    """`W1:half` -> {"prompts": [[ids]], "output": tokens to generate}."""
    base, _, size = name.partition(":")
    part = SIZES[size or "full"]
    rng = random.Random({"W1": 1, "W3": 3, "W4d": 4}[base])

    def draw(count: int) -> list[int]:
        return [rng.randrange(LOW, HIGH) for _ in range(count)]

    if base == "W1":
        prefix = draw(1024)
        return {"prompts": [prefix + draw(64) for _ in range(int(32 / part))], "output": 32}
    if base == "W4d":
        return {"prompts": [draw(1088) for _ in range(int(32 / part))], "output": 32}
    return {"prompts": [draw(512) for _ in range(int(16 / part))], "output": 64}
