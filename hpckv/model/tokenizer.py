"""Text <-> token ids and chat templates of a Hugging Face folder, by the `tokenizers` and `jinja2` libraries. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from hpckv.errors import InputError, ModelError

Message = Mapping[str, Any]


class Tokenizer:
    """The folder's `tokenizer.json` and chat template. Raises `ModelError` if there is no tokenizer."""

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.exists():
            raise ModelError(f"{file}: missing; without it only prompts of token ids can be run")
        try:
            self._fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - the library raises plain Exception
            raise ModelError(f"{file}: not readable as a tokenizer ({error})") from None
        # Left over from training in many checkpoints; a prompt is never shortened or filled up unasked.
        self._fast.no_truncation()
        self._fast.no_padding()
        settings = folder / "tokenizer_config.json"
        try:
            self._config: dict[str, Any] = (
                dict(json.loads(settings.read_text(encoding="utf-8"))) if settings.exists() else {}
            )
            self._template = _find_template(folder, self._config)
        except (OSError, ValueError, TypeError, KeyError, jinja2.TemplateError) as error:
            raise ModelError(f"{settings}: not readable, or its chat template is not ({error})") from None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a plain prompt, with the special tokens the tokenizer adds (a leading <s>, say)."""
        ids: list[int] = self._fast.encode(text).ids
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat up to where the assistant's answer begins; raises `InputError` for what the template refuses."""
        ids: list[int] = self._fast.encode(self.render_chat(messages), add_special_tokens=False).ids
        return ids

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The chat as text, by the folder's template."""
        if self._template is None:
            raise InputError("the model has no chat template; use /v1/completions")
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens())
        except Exception as error:  # noqa: BLE001 - a template is a program of somebody else's
            raise InputError(f"the chat template refuses these messages ({error})") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """One token as text, special tokens included; bytes that are no character become U+FFFD."""
        text: str = self._fast.decode([token_id], skip_special_tokens=False)
        return text

    def _special_tokens(self) -> dict[str, str]:
        tokens = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = self._config.get(name)
            tokens[name] = value.get("content", "") if isinstance(value, dict) else (value or "")
        return tokens


class TextStream:
    """Text of a growing answer, decoded a few tokens at a time; an unfinished character is held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._done = 0
        """Tokens before this one are in `text` for good."""
        self._before = ""

    def text(self, ids: Sequence[int]) -> str:
        """The text of `ids`, which begin with those of the last call. Cost: the tokens since the last settled word."""
        tail = self._tokenizer.decode(ids[self._done :])
        if len(ids) - self._done > 16 and not tail.endswith("\ufffd"):
            self._settle(ids)
            tail = self._tokenizer.decode(ids[self._done :])
        return self._before + tail

    def _settle(self, ids: Sequence[int]) -> None:
        # Decoders treat the first token of a text specially (a leading space), so a seam is moved only where both
        # sides decode to the same text as the whole.
        cut = len(ids) - 4
        left, right = self._tokenizer.decode(ids[self._done : cut]), self._tokenizer.decode(ids[cut:])
        if left + right == self._tokenizer.decode(ids[self._done :]) and not left.endswith("\ufffd"):
            self._before += left
            self._done = cut


def _find_template(folder: Path, config: Mapping[str, Any]) -> jinja2.Template | None:
    source = config.get("chat_template")
    file = folder / "chat_template.jinja"
    if file.exists():
        source = file.read_text(encoding="utf-8")
    if isinstance(source, list):  # several named templates
        source = next((t["template"] for t in source if t.get("name") == "default"), None)
    if not source:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(source)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
