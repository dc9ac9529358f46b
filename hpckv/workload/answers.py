"""Output lines as the OpenAI Batch API writes them, with hpckv's own usage beside. No torch."""

from __future__ import annotations

import time
from typing import Any

from hpckv.engine.request import Answer, Completion, TokenLogprob, Usage
from hpckv.model.tokenizer import Tokenizer
from hpckv.workload.lines import CHAT_URL, BadLine, BatchLine


def output_line(line: BatchLine, answer: Answer, model: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The line of `output.jsonl` for an answered request."""
    is_chat = line.url == CHAT_URL
    make_choice = _chat_choice if is_chat else _text_choice
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{line.custom_id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": line.model or model,
        "choices": [make_choice(c, tokenizer) for c in answer.completions],
        "usage": usage_record(answer.usage),
    }
    return {
        "id": line.request_id,
        "custom_id": line.custom_id,
        "response": {"status_code": 200, "request_id": line.custom_id, "body": body},
        "error": None,
    }


def error_line(number: int, custom_id: str | None, code: str, message: str) -> dict[str, Any]:
    """The line of `errors.jsonl` for a request that could not be answered."""
    return {
        "id": f"batch_req_{custom_id or f'line-{number}'}",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message, "line": number},
    }


def bad_line_record(bad: BadLine) -> dict[str, Any]:
    return error_line(bad.number, bad.custom_id, "invalid_request", bad.reason)


def usage_record(usage: Usage) -> dict[str, Any]:
    """OpenAI's words, Anthropic's words, and where each prompt token came from."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": usage.computed_tokens,
        "hpckv": {**usage.cached, "computed": usage.computed_tokens},
    }


def _chat_choice(completion: Completion, tokenizer: Tokenizer | None) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        logprobs = {"content": [_chat_logprob(entry, tokenizer) for entry in completion.logprobs], "refusal": None}
    return {
        "index": completion.index,
        "message": {"role": "assistant", "content": completion.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }


def _text_choice(completion: Completion, tokenizer: Tokenizer | None) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": completion.index,
        "text": completion.text,
        "logprobs": None,
        "finish_reason": completion.finish_reason,
    }
    if tokenizer is None:
        choice["token_ids"] = completion.token_ids
    if completion.logprobs is not None:
        tokens = [_token_text(entry.token_id, tokenizer) for entry in completion.logprobs]
        offsets = [0]
        for token in tokens[:-1]:
            offsets.append(offsets[-1] + len(token))
        choice["logprobs"] = {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in completion.logprobs],
            "top_logprobs": [{_token_text(i, tokenizer): p for i, p in entry.top} for entry in completion.logprobs],
            "text_offset": offsets[: len(tokens)],
        }
    return choice


def _chat_logprob(entry: TokenLogprob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    def one(token_id: int, logprob: float) -> dict[str, Any]:
        text = _token_text(token_id, tokenizer)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {**one(entry.token_id, entry.logprob), "top_logprobs": [one(i, p) for i, p in entry.top]}


def _token_text(token_id: int, tokenizer: Tokenizer | None) -> str:
    return tokenizer.token_text(token_id) if tokenizer else f"token_id:{token_id}"
