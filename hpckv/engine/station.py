"""How one rank carries out the steps that rank 0 sends: operations on the store, then its stage of the forward.

A stage takes the stream from the rank before it and hands it to the rank behind; the last one samples, and its first
tensor rank sends rank 0 the tokens. What ranks may know differently - whether stored blocks have come - is agreed on by a
minimum over all of them, in every step as long as blocks are on their way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hpckv.comm.group import Pending
from hpckv.engine.rank import Rank
from hpckv.engine.request import TokenLogprob
from hpckv.engine.sampler import Sampled
from hpckv.engine.step import RankChunk
from hpckv.engine.step_message import EndFetch, Offload, Operation, Place, StartFetch, StepMessage
from hpckv.store.fetch import Fetch
from hpckv.store.segment import StoredBlock

TOKENS_TAG = 2
LOAD_POLL_S = 0.05
_NEVER = np.iinfo(np.int32).max

Results = npt.NDArray[np.float64]


@dataclass
class Times:
    """Seconds of this rank, since the first step."""

    compute_s: float = 0.0
    tensor_s: float = 0.0
    """Of these: waiting for and exchanging with other tensor ranks."""
    stage_s: float = 0.0
    """Waiting for the stage before."""
    message_s: float = 0.0
    """Waiting for rank 0, or on it for tokens."""
    store_s: float = 0.0
    steps: float = 0.0


@dataclass
class Vote:
    """What all ranks have of the fetches under way, agreed on once `pending` is done: block counts, then first bridged ones."""

    numbers: list[int]
    values: npt.NDArray[np.int32]
    pending: Pending


class Station:
    """Carries out messages in order."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.world = rank, rank.world
        self.times = Times()
        self._runner, self._votes = rank.runner, rank.world.group.split(0)
        self._link = rank.transport.stream
        self.fetches: dict[int, Fetch] = {}
        self._sends: deque[Pending] = deque()
        dims = self.world.dims
        self._before = self.world.rank_of(dims.pp_rank - 1, dims.tp_rank)
        self._behind = self.world.rank_of(dims.pp_rank + 1, dims.tp_rank)

    def carry_out(self, message: StepMessage) -> tuple[list[Sampled] | None, Vote | None]:
        """Do this rank's part. Tokens on ranks of the last stage; the vote of this step, if blocks are on their way."""
        self._forget_sent()
        stream = self._expect_stream(message.chunks)
        begun = time.perf_counter()
        for operation in message.operations:
            self._operate(operation)
        if not message.chunks:
            self._wait_for_a_block()
        self.times.store_s += time.perf_counter() - begun
        vote = self._vote()
        sampled = self._compute(message, stream) if message.chunks else None
        return sampled, vote

    def _expect_stream(self, chunks: Sequence[RankChunk]) -> Callable[[], torch.Tensor] | None:
        if not chunks or self.world.dims.is_first_stage:
            return None
        size = sum(chunk.num_tokens for chunk in chunks), self.rank.model_config.hidden_size
        return self._link.expect(size, self._runner.decoder.dtype, self._before)

    def _compute(self, message: StepMessage, stream: Callable[[], torch.Tensor] | None) -> list[Sampled] | None:
        watch, dims, x_TD = self.world.watch, self.world.dims, None
        if stream is not None:
            begun = time.perf_counter()
            x_TD = stream()
            self.times.stage_s += time.perf_counter() - begun
        begun, waited = time.perf_counter(), watch.waited_s
        x_TD = self._runner.forward(message.chunks, x_TD)
        sampled = None
        if dims.is_last_stage:
            sampled = self._runner.sample(message.chunks, x_TD)
            if dims.tp_rank == 0 and dims.pp > 1:
                self._sends.append(self.world.group.send(pack_results(message.chunks, sampled), 0, TOKENS_TAG))
        else:
            self._sends.append(self._link.send(x_TD, self._behind))
        self.times.compute_s += time.perf_counter() - begun
        self.times.tensor_s += watch.waited_s - waited
        self.times.steps += 1
        return sampled

    def _forget_sent(self) -> None:
        while self._sends and self._sends[0].is_done():
            self._sends.popleft()

    def finish_sends(self) -> None:
        """Wait until nothing of this rank's is under way any more."""
        while self._sends:
            self.world.watch.wait(self._sends.popleft(), "another rank to receive")

    def _operate(self, operation: Operation) -> None:
        store, pool = self.rank.store, self.rank.pool
        assert store is not None
        assert pool is not None
        match operation:
            case Offload(key, parent, position, page):
                if self.rank.pages.owned.num_kv_heads:
                    store.save(StoredBlock(key, parent, position, pool.read_block(page)), keeps_payload=True)
            case StartFetch(number, keys, parent):
                self.fetches[number] = store.fetch(keys, parent)
            case Place(number, first, pages):
                pool.write_blocks(pages, self.fetches[number].loaded[first : first + len(pages)])
            case EndFetch(number):
                self.fetches.pop(number).is_over = True

    def _wait_for_a_block(self) -> None:
        """There is nothing to compute until stored blocks come: give them a moment."""
        waiting = next((fetch for fetch in self.fetches.values() if not fetch.is_done), None)
        if waiting is not None:
            waiting.wait(LOAD_POLL_S)

    def _vote(self) -> Vote | None:
        if not self.fetches:
            return None
        numbers = list(self.fetches)
        values = np.full(2 * len(numbers), _NEVER, np.int32)
        for n, fetch in enumerate(self.fetches.values()):
            if not fetch.is_done:
                values[n] = -1
                continue
            found = fetch.loaded
            values[n] = len(found)
            bridged = [number for number, loaded in enumerate(found) if loaded.is_bridged]
            values[len(numbers) + n] = bridged[0] if bridged else _NEVER
        vote = Vote(numbers, values, self._votes.reduce_min(values))
        self._sends.append(vote.pending)
        return vote


def results_shape(chunks: Sequence[RankChunk]) -> tuple[int, int]:
    """Rows and columns of what the last stage sends of a step: at least one row, so that its end is known."""
    draws = [chunk.draw for chunk in chunks if chunk.draw is not None]
    return max(1, len(draws)), 4 + 2 * max((draw.params.logprobs or 0 for draw in draws), default=0)


def pack_results(chunks: Sequence[RankChunk], sampled: Sequence[Sampled]) -> Results:
    """Token, whether the logits are finite, its log-probability, how many alternatives, and those: a row each."""
    out = np.zeros(results_shape(chunks))
    for row, found in zip(out, sampled, strict=False):
        row[:2] = found.token, found.is_finite
        if found.logprob is not None:
            row[2:4] = found.logprob.logprob, len(found.logprob.top)
            for n, (token, logprob) in enumerate(found.logprob.top):
                row[4 + 2 * n : 6 + 2 * n] = token, logprob
    return out


def unpack_results(chunks: Sequence[RankChunk], array: Results) -> list[Sampled]:
    """The reverse of `pack_results`."""
    draws = [chunk.draw for chunk in chunks if chunk.draw is not None]
    found = []
    for draw, row in zip(draws, array.tolist(), strict=False):
        token, logprob = int(row[0]), None
        if draw.params.logprobs is not None:
            pairs = row[4 : 4 + 2 * int(row[3])]
            top = tuple((int(i), p) for i, p in zip(pairs[::2], pairs[1::2], strict=True))
            logprob = TokenLogprob(token, row[2], top)
        found.append(Sampled(token, logprob, bool(row[1])))
    return found
