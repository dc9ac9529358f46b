"""OpenAI Batch lines in: read, checked, with line numbers for everything that is wrong. No torch, no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from hpckv.engine.request import SamplingParams
from hpckv.errors import AccessError, ConfigError, InputError, MissingInputError
from hpckv.schema import convert

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"

_SAMPLING_KEYS = {
    "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "n", "ignore_eos",
}  # fmt: skip
_OTHER_KEYS = {
    "model", "messages", "prompt", "max_completion_tokens", "logprobs", "top_logprobs", "stream", "user", "metadata", "store",
    "prompt_cache_key",
}  # fmt: skip


@dataclass(frozen=True)
class BatchLine:
    """One request as it was written. Exactly one of `messages`, `text`, `token_ids` is given."""

    number: int
    custom_id: str
    url: str
    params: SamplingParams
    model: str = ""
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    token_ids: list[int] | None = None
    session: str | None = None
    """`prompt_cache_key`: lines that have the same one are sent to the same replica, where that costs nothing."""

    @property
    def prompt(self) -> list[dict[str, Any]] | str | list[int]:
        """Whichever was given."""
        given = self.messages or self.text or self.token_ids
        assert given is not None
        return given

    @property
    def request_id(self) -> str:
        """`id` in the output: of its name, its prompt and its parameters, so that an answer tells what it was given to."""
        asked = [self.custom_id, self.url, self.prompt, msgspec.structs.asdict(self.params)]
        return f"batch_req_{blake3(json.dumps(asked, sort_keys=True).encode()).hexdigest(16)}"


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be run, and why."""

    number: int
    custom_id: str | None
    reason: str


@dataclass
class BatchInput:
    """A whole input file."""

    lines: list[BatchLine] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    unknown_keys: dict[str, int] = field(default_factory=dict)
    """Body keys that have no effect here -> first line that has them."""


def read_batch(path: Path, defaults: SamplingParams) -> BatchInput:
    """Read and check every line; raises `MissingInputError` for the file, `InputError` if it is empty."""
    batch = BatchInput()
    seen: dict[str, int] = {}
    for number, raw in _raw_lines(path):
        line = _read_line(number, raw, defaults, batch.unknown_keys)
        if isinstance(line, BatchLine) and line.custom_id in seen:
            line = BadLine(
                number, line.custom_id, f"custom_id {line.custom_id!r} is already used in line {seen[line.custom_id]}"
            )
        if isinstance(line, BadLine):
            batch.bad.append(line)
        else:
            seen[line.custom_id] = number
            batch.lines.append(line)
    if not batch.lines and not batch.bad:
        raise InputError(f"{path}: the file is empty; expected OpenAI Batch lines")
    return batch


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield number, raw
    except PermissionError:
        raise AccessError(f"{path}: permission denied") from None
    except OSError as error:
        raise MissingInputError(f"{path}: {error.strerror}") from None


def _read_line(number: int, raw: bytes, defaults: SamplingParams, unknown: dict[str, int]) -> BatchLine | BadLine:
    custom_id = None
    try:
        record = json.loads(raw.decode("utf-8"))
        if not isinstance(record, dict):
            raise InputError("expected a JSON object")
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair passes JSON and nothing after it
        custom_id = record.get("custom_id")
        return _parse(number, record, defaults, unknown)
    except UnicodeDecodeError:
        return BadLine(number, None, "not UTF-8")
    except UnicodeEncodeError:
        return BadLine(number, None, "has half a surrogate pair (text cut inside a character)")
    except json.JSONDecodeError as error:
        return BadLine(number, None, f"not valid JSON ({error.msg} at column {error.colno})")
    except (InputError, ConfigError) as error:
        return BadLine(number, custom_id if isinstance(custom_id, str) else None, str(error))
    except (ValueError, RecursionError):
        return BadLine(number, None, "not valid JSON (a number too long, or nested too deep)")


def _parse(number: int, record: Mapping[str, Any], defaults: SamplingParams, unknown: dict[str, int]) -> BatchLine:
    custom_id, body = record.get("custom_id"), record.get("body")
    url = record.get("url", CHAT_URL if isinstance(body, dict) and "messages" in body else COMPLETIONS_URL)
    if not isinstance(custom_id, str) or not custom_id:
        raise InputError("custom_id is missing or no text")
    if record.get("method", "POST") != "POST":
        raise InputError(f"method {record['method']!r} is not POST")
    if url not in (CHAT_URL, COMPLETIONS_URL):
        raise InputError(f"url {url!r} is neither {CHAT_URL} nor {COMPLETIONS_URL}")
    if not isinstance(body, dict):
        raise InputError("body is missing or no object")
    for key in body:
        if key not in _SAMPLING_KEYS and key not in _OTHER_KEYS:
            unknown.setdefault(key, number)
    if body.get("stream"):
        raise InputError("stream is not possible in a batch")
    session = body.get("prompt_cache_key")
    if session is not None and not isinstance(session, str):
        raise InputError("prompt_cache_key is no text")
    line = BatchLine(
        number, custom_id, url, _sampling(body, url, defaults), str(body.get("model", "")), session=session
    )
    given = _messages(body) if url == CHAT_URL else _prompt(body)
    return BatchLine(**{**line.__dict__, **given})


def _messages(body: Mapping[str, Any]) -> dict[str, Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("messages is missing, empty or no list")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError("every message is an object with a role")
        if not isinstance(message.get("content"), str):
            raise InputError("a message's content must be text")
    return {"messages": messages}


def _prompt(body: Mapping[str, Any]) -> dict[str, Any]:
    prompt = body.get("prompt")
    if isinstance(prompt, str) and prompt:
        return {"text": prompt}
    if isinstance(prompt, list) and prompt and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        return {"token_ids": prompt}
    raise InputError("prompt is missing, empty, or neither a text nor a list of token ids")


def _sampling(body: Mapping[str, Any], url: str, defaults: SamplingParams) -> SamplingParams:
    own = {key: body[key] for key in _SAMPLING_KEYS & body.keys() if body[key] is not None}
    if isinstance(own.get("stop"), str):
        own["stop"] = [own["stop"]]
    if body.get("max_completion_tokens") is not None:
        own["max_tokens"] = body["max_completion_tokens"]
    if url == CHAT_URL:
        if body.get("logprobs") is True:
            own["logprobs"] = body.get("top_logprobs") or 0
    elif body.get("logprobs") is not None:
        own["logprobs"] = body["logprobs"]
    return convert({**msgspec.structs.asdict(defaults), **own}, SamplingParams, "body") if own else defaults
