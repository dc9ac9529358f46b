"""What a list of prompts costs: tokens of its prefix tree, counted by the planner of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hpckv.errors import InputError
from hpckv.model.tokenizer import Tokenizer
from hpckv.store.block import prefix_keys
from hpckv.workload.lint.prompts import Prompt
from hpckv.workload.plan import least_prefill

BYTES_PER_TOKEN = 4
"""Of UTF-8, where no tokenizer is given: about what English text has in vocabularies of 32k to 128k."""
_NO_KEY = bytes(32)
"""Of the keys of blocks only whether they are equal counts here."""


class PrefixCosts:
    """Counts tokens with a model's tokenizer, or estimates them: four bytes of UTF-8 are a token."""

    def __init__(self, block_tokens: int, tokenizer: Tokenizer | None = None) -> None:
        self.block_tokens = block_tokens
        self._tokenizer = tokenizer
        self._sizes: dict[Prompt, tuple[int, list[bytes]]] = {}
        self._keys: dict[bytes, bytes] = {}
        """Equal keys are one object: most prompts share most of theirs."""

    @property
    def is_estimate(self) -> bool:
        return self._tokenizer is None

    def tokens(self, prompts: Sequence[Prompt]) -> int:
        """Prompt tokens of all requests."""
        return sum(self._size(prompt)[0] for prompt in prompts)

    def distinct_tokens(self, prompts: Sequence[Prompt], step: Callable[[], None] = lambda: None) -> int:
        """Distinct-prefix tokens: what must be computed with a cache of any size. `step` is called for each prompt.

        Raises `InputError` for a prompt that the model's chat template refuses.
        """
        sizes = []
        for prompt in prompts:
            sizes.append(self._size(prompt))
            step()
        sizes.sort(key=lambda size: size[0])
        return least_prefill(sizes, self.block_tokens)[0]

    def _size(self, prompt: Prompt) -> tuple[int, list[bytes]]:
        found = self._sizes.get(prompt)
        if found is None:
            ids = self._token_ids(prompt)
            keys = prefix_keys(_NO_KEY, b"", ids, self.block_tokens)
            found = self._sizes[prompt] = len(ids), [self._keys.setdefault(key, key) for key in keys]
        return found

    def _token_ids(self, prompt: Prompt) -> Sequence[int]:
        if not prompt.messages:
            return prompt.token_ids
        if self._tokenizer is None:
            return _estimated_ids(prompt)
        if not prompt.messages[0].role:
            return self._tokenizer.encode(prompt.messages[0].text)
        try:
            return self._tokenizer.encode_chat([message.plain for message in prompt.messages])
        except InputError as error:
            raise InputError(f"line {prompt.number}: {error}") from None


def _estimated_ids(prompt: Prompt) -> Sequence[int]:
    """The text itself, four bytes a token: equal beginnings have equal tokens, as with a tokenizer."""
    text = "".join(f"{role}{fields}\n{text}\n" if role else text for role, text, fields in prompt.messages)
    data = text.encode()
    ids: Sequence[int] = np.frombuffer(data + bytes(-len(data) % BYTES_PER_TOKEN), "<u4")  # type: ignore[assignment]
    return ids
