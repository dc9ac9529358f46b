"""Running the command as a user does: a new process, a folder, a run file. For tests."""

import json
import subprocess
import sys
from pathlib import Path


def hpckv(*arguments, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """Run `hpckv ARGUMENTS` to its end."""
    command = [sys.executable, "-m", "hpckv.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)


def write_run(folder: Path, model: Path, lines: list[dict] | bytes, **sections) -> Path:
    """A run file over `lines` in `folder`, its output in folder/out."""
    data = lines if isinstance(lines, bytes) else "".join(json.dumps(n) + "\n" for n in lines).encode()
    (folder / "in.jsonl").write_bytes(data)
    config = {
        "model": {"path": str(model)},
        "input": str(folder / "in.jsonl"),
        "output": str(folder / "out"),
        "cache": {"block_tokens": 16, "device_memory": "64MiB"},
        "sampling": {"max_tokens": 8},
        **sections,
    }
    (folder / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder / "run.yaml"


def chat_lines(count: int, *, heads: int = 3) -> list[dict]:
    """Questions over a few shared system messages."""
    return [
        {
            "custom_id": f"q{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "messages": [
                    {
                        "role": "system",
                        "content": f"Head {n % heads}. " + "All the same words for everybody here. " * 4,
                    },
                    {"role": "user", "content": f"Question number {n}?"},
                ]
            },
        }
        for n in range(count)
    ]


def long_run(folder: Path, model: Path, output_tokens: int = 120) -> Path:
    """More than a start gets done before something happens to it, also on a fast machine: one request at a time, many of them."""
    sampling = {"max_tokens": output_tokens, "ignore_eos": True}
    return write_run(folder, model, chat_lines(60), sampling=sampling, engine={"max_requests": 1})


def answers(folder: Path, name: str = "out") -> dict[str, dict]:
    """custom_id -> body of every line of output.jsonl; no id stands twice."""
    rows = [json.loads(raw) for raw in (folder / name / "output.jsonl").read_bytes().splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row["response"]["body"] for row in rows}


def texts(folder: Path, name: str = "out") -> dict[str, str]:
    return {custom_id: body["choices"][0]["message"]["content"] for custom_id, body in answers(folder, name).items()}
