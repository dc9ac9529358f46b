"""From prompts to token ids and block keys, by one model's tokenizer and one store's key. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hpckv.model.tokenizer import Tokenizer
from hpckv.store import ROOT_KEY, block_key, prefix_keys

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""A text, token ids, or the messages of a chat."""

NO_STORE_KEY = bytes(32)
"""Key epoch, and identity, of a process without a store: its block keys are seen by nobody else."""


class PromptReader:
    """What prompts are to one model in one store."""

    def __init__(
        self, folder: Path, block_tokens: int, *, epoch_key: bytes = NO_STORE_KEY, identity: bytes = NO_STORE_KEY
    ) -> None:
        self._folder, self.block_tokens = folder, block_tokens
        self._epoch_key, self._identity = epoch_key, identity

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, or None if its folder has none (prompts of token ids still work)."""
        return Tokenizer(self._folder) if (self._folder / "tokenizer.json").exists() else None

    def ids_of(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, a chat, or token ids as they are; raises `InputError`, `ModelError`."""
        if not isinstance(prompt, str) and all(isinstance(part, int) for part in prompt):
            return [int(part) for part in prompt if isinstance(part, int)]
        if self.tokenizer is None:
            Tokenizer(self._folder)  # raises the error that says what is missing
        assert self.tokenizer is not None
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat([part for part in prompt if isinstance(part, dict)])

    def keys_of(self, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of a prompt's full blocks."""
        return prefix_keys(self._epoch_key, self._identity, token_ids, self.block_tokens)

    def key_after(self, parent: bytes | None, token_ids: Sequence[int]) -> bytes:
        """Key of one block behind another; None is the beginning."""
        return block_key(self._epoch_key, self._identity, parent or ROOT_KEY, token_ids)
