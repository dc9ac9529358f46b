#!/usr/bin/env python3
"""Write the demo's batch: chat questions over a few shared catalogues, and the right answers beside.

    python examples/make_catalogue.py          # examples/catalogue.jsonl, examples/catalogue_answers.jsonl

Lines are in random order, as they come from users: finding out what they share is the run's work.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from recall_task import make_catalogue, question

HERE = Path(__file__).parent


def main() -> None:
    """Write both files."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--catalogues", type=int, default=4)
    ap.add_argument("--records", type=int, default=245, help="in each; 245 are about 1,000 tokens")
    ap.add_argument("--questions", type=int, default=60, help="about each")
    ap.add_argument("--two-hop", type=float, default=0.0, help="share of questions that need two records")
    ap.add_argument("--seed", type=int, default=20)
    ap.add_argument("--out", type=Path, default=HERE / "catalogue.jsonl")
    args = ap.parse_args()

    rng = random.Random(args.seed)
    rows = []
    for number in range(args.catalogues):
        catalogue = make_catalogue(rng, args.records)
        for n in range(args.questions):
            key = rng.choice(catalogue.keys(2 if rng.random() < args.two_hop else 1))
            messages = [{"role": "system", "content": catalogue.text()}, {"role": "user", "content": question(key)}]
            line = {
                "custom_id": f"catalogue{number}-{n:03d}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "recall-1m", "messages": messages, "max_tokens": 16, "temperature": 0},
            }
            rows.append((line, {"custom_id": line["custom_id"], "answer": catalogue.answer(key)}))
    rng.shuffle(rows)
    answers = args.out.with_name(f"{args.out.stem}_answers.jsonl")
    args.out.write_text("".join(json.dumps(line) + "\n" for line, _ in rows), encoding="utf-8")
    answers.write_text("".join(json.dumps(answer) + "\n" for _, answer in rows), encoding="utf-8")
    print(f"{len(rows)} questions over {args.catalogues} catalogues: {args.out}, {answers}")


if __name__ == "__main__":
    main()
