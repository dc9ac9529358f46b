"""When a continuation ends: at an end token, a stop text, its length. No torch."""

from __future__ import annotations

from hpckv.engine.request import RunningSequence
from hpckv.model import ModelConfig
from hpckv.model.tokenizer import TextStream, Tokenizer


class Stopping:
    """Ends sequences, and gives those that end their text."""

    def __init__(self, model: ModelConfig, tokenizer: Tokenizer | None) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._streams: dict[RunningSequence, TextStream] = {}

    def check(self, seq: RunningSequence, token: int) -> None:
        """`token` has just been appended: set `finish_reason`, and `text`, if that was the last."""
        params = seq.params
        ends = () if params.ignore_eos else self._model.eos_token_ids
        if token in ends or token in params.stop_token_ids:
            seq.finish_reason = "stop"
        elif seq.num_output_tokens >= params.max_tokens or len(seq.tokens) >= self._model.max_positions:
            seq.finish_reason = "length"
        if self._tokenizer is None or not (params.stop or seq.finish_reason):
            return
        if not params.stop:  # nothing to look for on the way: decode once, at the end
            seq.text = self._tokenizer.decode(seq.output_ids)
            return
        stream = self._streams.setdefault(seq, TextStream(self._tokenizer))
        seq.text = stream.text(seq.output_ids)
        found = [at for stop in params.stop if (at := seq.text.find(stop)) >= 0]
        if found:
            seq.text = seq.text[: min(found)]
            seq.finish_reason = "stop"
        if seq.finish_reason:
            self.forget(seq)

    def forget(self, seq: RunningSequence) -> None:
        """It ends for another reason, or begins again."""
        self._streams.pop(seq, None)

    def clear(self) -> None:
        self._streams.clear()
