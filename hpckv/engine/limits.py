"""What a request may be: by the model, anywhere; and by the pages of this GPU, here. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from hpckv.engine.request import Request
from hpckv.errors import CapacityError


@dataclass(frozen=True)
class Limits:
    """Of one engine."""

    context: int
    """Tokens of prompt and answer that the model can take."""
    vocab_size: int
    held_tokens: int
    """That all pages of this engine hold."""
    has_tokenizer: bool

    def tokens_of(self, request: Request) -> int:
        """The most it can hold at once."""
        return min(self.context, len(request.prompt_ids) + request.params.max_tokens)

    def check_prompt(self, request: Request) -> None:
        """Raise `CapacityError` if no engine with this model can answer it."""
        length = len(request.prompt_ids)
        if length == 0:
            raise CapacityError("the prompt is empty")
        if length >= self.context:
            raise CapacityError(f"the prompt has {length} tokens, the model's context is {self.context}")
        if not all(0 <= i < self.vocab_size for i in request.prompt_ids):
            raise CapacityError(f"a token id is outside the vocabulary of {self.vocab_size}")
        if request.params.stop and not self.has_tokenizer:
            raise CapacityError("stop strings need the model's tokenizer.json")

    def check(self, request: Request) -> None:
        """Raise `CapacityError` if this engine can never answer it."""
        self.check_prompt(request)
        most = self.tokens_of(request)
        if most > self.held_tokens:
            raise CapacityError(
                f"{most} tokens of prompt and answer do not fit the {self.held_tokens} of cache.device_memory"
            )
