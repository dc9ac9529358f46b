"""What rank 0 tells the others every step: one array of int32, and how it is read. No torch.

    0  number of the step          4  sequences that are new      8...  the sections, one after another:
    1  1 if it is the last one     5  chunks                            left, new, chunks, operations
    2  length in int32             6  operations on the store
    3  sequences that left         7  0

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
from hpckv.engine.scheduler import ScheduledChunk, StepPlan
from hpckv.engine.step import RankChunk

Ints = npt.NDArray[np.int32]

HEADER_INTS = 8
FIRST_INTS = 2048
"""So much goes out in one broadcast of fixed size; only what is longer needs a second one."""

_SAMPLING = struct.Struct("<ddQii")
_SAMPLING_INTS = _SAMPLING.size // 4
_KEY_INTS = 8
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
            out += [slot, *_sampling_ints(seq)]
        for chunk in plan.chunks:
            out += self._chunk(chunk)
        for operation in operations:
            out += _operation_ints(operation)
        out[2] = len(out)
        return np.array(out, dtype=np.int32)

    def _chunk(self, chunk: ScheduledChunk) -> list[int]:
        seq, told = chunk.seq, self._told[chunk.seq]
        pages = seq.pages[told.num_pages :]
        told.num_pages = len(seq.pages)
        return [
            told.slot,
            chunk.start,
            chunk.num_tokens,
            seq.num_registered,
            int(chunk.samples),
            len(pages),
            *pages,
            *seq.tokens[chunk.start : chunk.end],
        ]


@dataclass
class _Known:
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
            slot = next(values)
            self._known[slot] = _read_sampling(_take(values, _SAMPLING_INTS))
        chunks = [self._chunk(values) for _ in range(num_chunks)]
        return StepMessage(
            number, chunks, [_read_operation(values) for _ in range(num_operations)], is_last=bool(is_last)
        )

    def _chunk(self, values: Iterator[int]) -> RankChunk:
        slot, start, num_tokens, num_registered, samples, num_pages = _take(values, 6)
        known = self._known[slot]
        known.pages += _take(values, num_pages)
        tokens = _take(values, num_tokens)
        draw = Draw(known.params, known.seed, start + num_tokens) if samples else None
        return RankChunk(tokens, start, known.pages, num_registered, draw)


def _take(values: Iterator[int], count: int) -> list[int]:
    return list(itertools.islice(values, count))


def _sampling_ints(seq: RunningSequence) -> list[int]:
    params = seq.params
    logprobs = -1 if params.logprobs is None else params.logprobs
    top_k = min(params.top_k, _MOST)  # no vocabulary is larger
    packed = _SAMPLING.pack(params.temperature, params.top_p, seq.seed, top_k, logprobs)
    return _ints_of(packed)


def _read_sampling(ints: Sequence[int]) -> _Known:
    temperature, top_p, seed, top_k, logprobs = _SAMPLING.unpack(_bytes_of(ints))
    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, logprobs=None if logprobs < 0 else logprobs
    )
    return _Known(params, seed)


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
