"""What rank 0 tells the others every step: one array of int32, and how it is read. No torch.

    0  number of the step          4  sequences that are new      8...  the sections, one after another:
    1  1 if it is the last one     5  chunks                            left, new, chunks, operations
    2  length in int32             6  operations on the store
    3  sequences that left         7  0

A new sequence is (slot, owner) and its sampling. A chunk is (slot, start, tokens, registered pages, whether it samples, new pages).
The new pages of all chunks follow, then all tokens.

Ranks remember what they were told: a running sequence has a small number (its slot), under which every rank keeps its pages and
how it is sampled. A decode step therefore costs eight numbers a sequence, whatever its length.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hpckv.engine.request import RunningSequence, SamplingParams
from hpckv.engine.sampler import Draw
from hpckv.engine.scheduler import StepPlan
from hpckv.engine.step import RankChunk

Ints = npt.NDArray[np.int32]

HEADER_INTS = 8
FIRST_INTS = 2048
"""So much goes out in one broadcast of fixed size; only what is longer needs a second one."""

_SAMPLING = struct.Struct("<ddQii")
_SAMPLING_INTS = _SAMPLING.size // 4
_KEY_INTS = 8
_CHUNK_INTS = 6
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Offload:
    """Give a complete block to the store."""

    key: bytes
    parent: bytes
    position: int
    page: int


@dataclass(frozen=True)
class StartFetch:
    """Begin to load consecutive blocks."""

    number: int
    keys: tuple[bytes, ...]
    parent: bytes


@dataclass(frozen=True)
class Place:
    """Copy blocks of a fetch, from number `first` on, into pages."""

    number: int
    first: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class EndFetch:
    """Forget a fetch."""

    number: int


Operation = Offload | StartFetch | Place | EndFetch


@dataclass(frozen=True)
class StepMessage:
    """One step as every rank sees it. Operations come before the forward, in order."""

    number: int
    chunks: Sequence[RankChunk]
    operations: Sequence[Operation] = ()
    is_last: bool = False


@dataclass
class _Told:
    slot: int
    num_pages: int = 0


class MessageWriter:
    """Rank 0's side: remembers what the others know."""

    def __init__(self) -> None:
        self._told: dict[RunningSequence, _Told] = {}
        self._free: list[int] = []

    def encode(
        self, number: int, plan: StepPlan, operations: Sequence[Operation] = (), *, is_last: bool = False
    ) -> Ints:
        """The array for one step."""
        left = [told.slot for seq in plan.left if (told := self._told.pop(seq, None))]
        self._free += left
        out = [number, int(is_last), 0, len(left), 0, len(plan.chunks), len(operations), 0, *left]
        fresh = [chunk.seq for chunk in plan.chunks if chunk.seq not in self._told]
        out[4] = len(fresh)
        for seq in fresh:
            slot = self._free.pop() if self._free else len(self._told)
            self._told[seq] = _Told(slot)
            out += [slot, seq.admission, *_sampling_ints(seq)]
        pages: list[int] = []
        tokens: list[int] = []
        for chunk in plan.chunks:
            seq, told = chunk.seq, self._told[chunk.seq]
            known, told.num_pages = told.num_pages, len(seq.pages)
            pages += seq.pages[known:]
            tokens += seq.tokens[chunk.start : chunk.start + chunk.num_tokens]
            more = told.num_pages - known
            out += (told.slot, chunk.start, chunk.num_tokens, seq.num_registered, int(chunk.samples), more)
        out += pages
        out += tokens
        for operation in operations:
            out += _operation_ints(operation)
        out[2] = len(out)
        return np.array(out, dtype=np.int32)


@dataclass
class _Known:
    owner: int
    params: SamplingParams
    seed: int
    pages: list[int] = field(default_factory=list)


class MessageReader:
    """Another rank's side."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def decode(self, array: Ints) -> StepMessage:
        """The step that `array` tells of; must be called for every message, in order."""
        number, is_last, _, num_left, num_new, num_chunks, num_operations, _ = array[:HEADER_INTS].tolist()
        values = iter(array[HEADER_INTS:].tolist())
        for slot in _take(values, num_left):
            del self._known[slot]
        for _ in range(num_new):
            slot, owner = _take(values, 2)
            self._known[slot] = _Known(owner, *_read_sampling(_take(values, _SAMPLING_INTS)))
        chunks = self._chunks(values, num_chunks)
        operations = [_read_operation(values) for _ in range(num_operations)]
        return StepMessage(number, chunks, operations, is_last=bool(is_last))

    def _chunks(self, values: Iterator[int], count: int) -> list[RankChunk]:
        numbers = _take(values, _CHUNK_INTS * count)
        rows = list(zip(*[iter(numbers)] * _CHUNK_INTS, strict=True))
        for slot, *_, num_pages in rows:
            if num_pages:
                self._known[slot].pages += _take(values, num_pages)
        tokens, at = _take(values, sum(row[2] for row in rows)), 0
        chunks = []
        for slot, start, num_tokens, num_registered, samples, _ in rows:
            known = self._known[slot]
            draw = Draw(known.params, known.seed, start + num_tokens) if samples else None
            chunks.append(
                RankChunk(tokens[at : at + num_tokens], start, known.pages, num_registered, known.owner, draw)
            )
            at += num_tokens
        return chunks


def _take(values: Iterator[int], count: int) -> list[int]:
    return list(itertools.islice(values, count))


def _sampling_ints(seq: RunningSequence) -> list[int]:
    params = seq.params
    logprobs = -1 if params.logprobs is None else params.logprobs
    top_k = min(params.top_k, _MOST)  # no vocabulary is larger
    packed = _SAMPLING.pack(params.temperature, params.top_p, seq.seed, top_k, logprobs)
    return _ints_of(packed)


def _read_sampling(ints: Sequence[int]) -> tuple[SamplingParams, int]:
    temperature, top_p, seed, top_k, logprobs = _SAMPLING.unpack(_bytes_of(ints))
    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, logprobs=None if logprobs < 0 else logprobs
    )
    return params, seed


def _operation_ints(operation: Operation) -> list[int]:
    match operation:
        case Offload(key, parent, position, page):
            return [0, position, page, *_ints_of(key + parent)]
        case StartFetch(number, keys, parent):
            return [1, number, len(keys), *_ints_of(parent + b"".join(keys))]
        case Place(number, first, pages):
            return [2, number, first, len(pages), *pages]
        case EndFetch(number):
            return [3, number]


def _read_operation(values: Iterator[int]) -> Operation:
    match next(values):
        case 0:
            position, page = _take(values, 2)
            both = _bytes_of(_take(values, 2 * _KEY_INTS))
            return Offload(both[: len(both) // 2], both[len(both) // 2 :], position, page)
        case 1:
            number, count = _take(values, 2)
            parent, *keys = (_bytes_of(_take(values, _KEY_INTS)) for _ in range(count + 1))
            return StartFetch(number, tuple(keys), parent)
        case 2:
            number, first, count = _take(values, 3)
            return Place(number, first, tuple(_take(values, count)))
        case kind:
            assert kind == 3
            return EndFetch(next(values))


def _ints_of(data: bytes) -> list[int]:
    ints: list[int] = np.frombuffer(data, np.int32).tolist()
    return ints


def _bytes_of(ints: Sequence[int]) -> bytes:
    return np.array(ints, dtype=np.int32).tobytes()
