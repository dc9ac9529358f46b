"""A request as lint sees it: messages of text, and the units that prompts are compared by. Never changed in place."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, overload

from hpckv.engine.request import SamplingParams
from hpckv.errors import InputError
from hpckv.workload.lines import BatchLine, read_batch

_SHOWN = 60
"""Characters of offending text in a message."""


class Message(NamedTuple):
    """One message of a chat; a plain prompt is one message without a role."""

    role: str
    text: str
    fields: str = ""
    """Its other keys (`name`, `tool_calls`) as one JSON object."""

    @property
    def plain(self) -> dict[str, Any]:
        """As a batch line has it."""
        return {"role": self.role, "content": self.text, **(json.loads(self.fields) if self.fields else {})}


@dataclass(frozen=True)
class Prompt:
    """One request. A prompt of token ids has no messages: it is counted, and nothing is looked for in it."""

    number: int
    """Its line in the input."""
    custom_id: str
    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()

    def with_text(self, message: int, text: str) -> Prompt:
        """The same request with another text in one message."""
        messages = list(self.messages)
        messages[message] = messages[message]._replace(text=text)
        return self.with_messages(messages)

    def with_messages(self, messages: Sequence[Message]) -> Prompt:
        """The same request with other messages."""
        return replace(self, messages=tuple(messages))

    def with_end(self, text: str) -> Prompt:
        """The same request with `text` as a paragraph after everything else."""
        return self.with_text(len(self.messages) - 1, f"{self.messages[-1].text}\n\n{text}")


class Spot(NamedTuple):
    """Where something was found in a request."""

    number: int
    """Line of the input."""
    message: int
    """From 1."""
    character: int
    """In the message's text, from 1."""
    text: str


@dataclass
class Repaired:
    """All prompts after one repair. A prompt that it does not touch is the same object."""

    prompts: list[Prompt]
    spots: dict[int, Spot] = field(default_factory=dict)
    """Of each prompt that was touched, by index: the first thing found."""

    def put(self, index: int, prompt: Prompt, spot: Spot) -> None:
        """Replace one prompt."""
        self.prompts[index] = prompt
        self.spots.setdefault(index, spot)


def read_prompts(path: Path) -> list[Prompt]:
    """Every request of a file of batch lines; raises `InputError` naming the first bad line, `MissingInputError`."""
    batch = read_batch(path, SamplingParams())
    if batch.bad:
        more = f" ({len(batch.bad)} bad lines in all)" if len(batch.bad) > 1 else ""
        raise InputError(f"{path}:{batch.bad[0].number}: {batch.bad[0].reason}{more}")
    return [_prompt(line) for line in batch.lines]


def _prompt(line: BatchLine) -> Prompt:
    if line.token_ids is not None:
        return Prompt(line.number, line.custom_id, token_ids=tuple(line.token_ids))
    if line.text is not None:
        return Prompt(line.number, line.custom_id, (Message("", line.text),))
    return Prompt(line.number, line.custom_id, tuple(_message(message) for message in line.messages or ()))


def _message(message: dict[str, Any]) -> Message:
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return Message(message["role"], message["content"], json.dumps(rest, ensure_ascii=False) if rest else "")


def shown(text: str, length: int = _SHOWN) -> str:
    """`text` for a message: escaped, in quotes, and shortened in the middle."""
    if len(text) > length:
        text = text[: length * 2 // 3] + " ... " + text[-length // 3 :]
    return ascii(text)


_HEAD = re.compile(r"(?:\ufeff|[ \t\r]*\n)*")
_SENTENCE = re.compile(r"[^\n]*?[.!?:;][ \t]+|[^\n]*\n+(?:[ \t\r]*\n)*|[^\n]+")
KEPT_TEXTS = 1 << 15
"""Texts whose parts are remembered: repairs leave most texts as they are, and each looks at all of them."""


class Start(str):
    """The unit that begins a message: its role and other keys."""


class Units(Sequence[str]):
    """A prompt as sentences, each with the white space and blank lines behind it: pieces that are compared one by one.

    Each message begins with a `Start` and the white space before its text, and ends with that behind it, which may be empty.
    A message is cut when it is asked for: few prompts are alike up to their last one.
    """

    def __init__(self, prompt: Prompt) -> None:
        self._coming = iter(prompt.messages)
        self.seen: list[str] = []
        """Pieces of the messages that have been cut."""

    def at(self, place: int) -> str | None:
        """The piece at `place`, None behind the end."""
        while len(self.seen) <= place:
            message = next(self._coming, None)
            if message is None:
                return None
            self.seen.append(Start(message.role + message.fields))
            self.seen += _cut(message.text)
        return self.seen[place]

    def __len__(self) -> int:
        while self.at(len(self.seen)) is not None:
            pass
        return len(self.seen)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice) or not 0 <= place < len(self.seen):
            len(self)
        return self.seen[place]


@lru_cache(KEPT_TEXTS)
def units(prompt: Prompt) -> Units:
    """The units of a prompt; of the same one, the same object."""
    return Units(prompt)


@lru_cache(KEPT_TEXTS)
def _cut(text: str) -> list[str]:
    head = _HEAD.match(text)
    start = head.end() if head else 0
    end = max(start, len(text.rstrip()))
    return [text[:start], *_SENTENCE.findall(text, start, end), text[end:]]


BLANK_LINES = re.compile(r"(\n(?:[ \t\r]*\n)+)")


@lru_cache(KEPT_TEXTS)
def paragraphs(text: str) -> tuple[list[str], list[str]]:
    """Paragraphs, and the blank lines between them."""
    pieces = BLANK_LINES.split(text)
    return pieces[::2], pieces[1::2]


def from_units(prompt: Prompt, pieces: Sequence[str]) -> Prompt:
    """The prompt that has these units; the opposite of `units`."""
    texts: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, Start):
            texts.append([])
        else:
            texts[-1].append(piece)
    return prompt.with_messages(
        [message._replace(text="".join(text)) for message, text in zip(prompt.messages, texts, strict=True)]
    )


def place_of(pieces: Sequence[str], number: int) -> tuple[int, int]:
    """Message and character, both from 1, at which a unit begins."""
    start = max(n for n in range(number + 1) if isinstance(pieces[n], Start))
    message = sum(isinstance(piece, Start) for piece in pieces[: start + 1])
    return message, 1 + sum(len(piece) for piece in pieces[start + 1 : number])
