"""What rank 0 sends is what the others read, for every plan; its size follows from what is new, and its bytes are fixed."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpckv.engine.request import Request, RunningSequence, SamplingParams
from hpckv.engine.sampler import Draw
from hpckv.engine.scheduler import ScheduledChunk, StepPlan
from hpckv.engine.step import RankChunk, rank_chunks
from hpckv.engine.step_message import EndFetch, MessageReader, MessageWriter, Offload, Place, StartFetch

BLOCK = 4
INT32 = st.integers(0, 2**31 - 1)
KEY = st.binary(min_size=32, max_size=32)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=INT32,
    logprobs=st.none() | st.integers(0, 20),
    seed=st.none() | st.integers(),
    stop=st.sampled_from([[], ["end"]]),
    ignore_eos=st.booleans(),
)
OPERATION = st.one_of(
    st.builds(Offload, KEY, KEY, INT32, INT32),
    st.builds(StartFetch, INT32, st.lists(KEY, max_size=4).map(tuple), KEY),
    st.builds(Place, INT32, INT32, st.lists(INT32, max_size=5).map(tuple)),
    st.builds(EndFetch, INT32),
)
SEQUENCE = st.builds(
    lambda prompt, params, seed: RunningSequence(Request("r", prompt, params), 0, [], seed),
    st.lists(INT32, min_size=1, max_size=30),
    PARAMS,
    st.integers(0, 2**64 - 1),
)


def told(chunk: RankChunk) -> RankChunk:
    """Of a sampled row's parameters, those that decide its token."""
    if chunk.draw is None:
        return chunk
    own = chunk.draw.params
    params = SamplingParams(temperature=own.temperature, top_p=own.top_p, top_k=own.top_k, logprobs=own.logprobs)
    draw = Draw(params, chunk.draw.seed, chunk.draw.position)
    return RankChunk(chunk.tokens, chunk.start, chunk.pages, chunk.num_registered, chunk.owner, draw)


def add_chunk(plan: StepPlan, seq: RunningSequence, limit: int, spare: int, pages) -> None:
    chunk = ScheduledChunk.next_of(seq, limit)
    missing = -(-chunk.end // BLOCK) - len(seq.pages)
    seq.pages += itertools.islice(pages, max(0, missing) + spare)
    plan.add(chunk)


def carry_out(plan: StepPlan) -> None:
    for chunk in plan.chunks:
        chunk.seq.num_computed = chunk.end
        chunk.seq.num_registered = chunk.end // BLOCK
        if chunk.samples:
            chunk.seq.tokens.append(chunk.end)


def stop(plan: StepPlan, seq: RunningSequence) -> None:
    seq.pages, seq.num_computed, seq.num_registered = [], 0, 0
    plan.left.append(seq)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_plan_is_read_as_it_was_written(data):
    writer, reader, pages = MessageWriter(), MessageReader(), itertools.count(1)
    running: list[RunningSequence] = []
    for number in range(data.draw(st.integers(1, 8), "steps")):
        plan = StepPlan()
        running += data.draw(st.lists(SEQUENCE, max_size=3), "joining")
        for seq in list(running):
            fate = data.draw(st.sampled_from(["run", "run", "run", "rest", "finish", "preempt", "readmit"]), "fate")
            if fate in ("finish", "preempt", "readmit"):
                stop(plan, seq)
            if fate == "finish":
                running.remove(seq)
            if fate in ("run", "readmit"):
                add_chunk(plan, seq, data.draw(st.integers(1, 12), "limit"), data.draw(st.integers(0, 2)), pages)
        operations = data.draw(st.lists(OPERATION, max_size=3), "operations")
        is_last = data.draw(st.booleans(), "is_last")

        array = writer.encode(number, plan, operations, is_last=is_last)
        found = reader.decode(array)
        assert (array.dtype, array[2]) == (np.int32, len(array))
        assert (found.number, found.is_last) == (number, is_last)
        assert list(found.chunks) == [told(chunk) for chunk in rank_chunks(plan)]
        assert list(found.operations) == operations
        carry_out(plan)


def sequence(prompt: list[int], *, seed: int = 0, **params) -> RunningSequence:
    return RunningSequence(Request("r", prompt, SamplingParams(**params)), 0, [], seed)


def plan_of(*sequences: RunningSequence, pages=()) -> StepPlan:
    """All that is left of every sequence; `pages` are new ones of the last."""
    plan = StepPlan()
    sequences[-1].pages += pages
    for seq in sequences:
        plan.add(ScheduledChunk.next_of(seq, 10**9))
    return plan


@pytest.mark.parametrize("length", [2, 6, 100_002])
def test_a_decode_steps_size_does_not_depend_on_the_sequences_length(length):
    writer = MessageWriter()
    one, two = sequence([5] * length, logprobs=20, top_k=7), sequence([9] * length, temperature=1.0)
    one.pages = list(range(length // BLOCK + 1))
    plan = plan_of(one, two, pages=range(10**6, 10**6 + length // BLOCK + 1))
    assert len(writer.encode(0, plan)) > 2 * length
    carry_out(plan)
    assert len(writer.encode(1, plan_of(one, two))) == 8 + 7 + 7
    carry_out(plan_of(one, two))
    assert len(writer.encode(2, plan_of(one, two, pages=[77]))) == 8 + 7 + 8


def test_a_step_without_anything_is_its_header():
    assert MessageWriter().encode(3, StepPlan(), is_last=True).tolist() == [3, 1, 8, 0, 0, 0, 0, 0]


def test_numbers_of_sequences_that_left_are_given_again():
    writer, sequences = MessageWriter(), [sequence([n]) for n in range(50)]
    for number, (before, seq) in enumerate(itertools.pairwise(sequences)):
        plan = plan_of(seq)
        plan.left = [before]
        array = writer.encode(number, plan).tolist()
        assert array[3] == (number > 0)  # the very first one was never told of
        assert array[8] == 0


def test_any_top_k_can_be_told():
    seq = sequence([5], temperature=1.0, top_k=2**40)
    (chunk,) = MessageReader().decode(MessageWriter().encode(0, plan_of(seq))).chunks
    assert chunk.draw.params.top_k == 2**31 - 1  # more than any vocabulary has


def test_the_bytes_of_a_message_are_these():
    writer = MessageWriter()
    gone, stays, new = sequence([1, 2], seed=3), sequence([10, 11, 12]), sequence([7], temperature=0.5, seed=2**63)
    first = plan_of(gone, stays, pages=[4])
    writer.encode(0, first)
    carry_out(first)
    plan = plan_of(stays, new, pages=[5, 6])
    plan.left = [gone]
    operations = [
        Offload(bytes([1] * 32), bytes([2] * 32), 16, 4),
        StartFetch(9, (bytes([3] * 32),), bytes(32)),
        Place(9, 1, (5, 6)),
        EndFetch(9),
    ]
    assert writer.encode(1, plan, operations).tobytes().hex(" ", 4) == " ".join(
        [
            "01000000 00000000 51000000 01000000 01000000 02000000 04000000 00000000",
            "00000000",  # left: one that had number 0, which is given to the new one
            "00000000 00000000 00000000 0000e03f 00000000 0000f03f 00000000 00000080 00000000 ffffffff",
            "01000000 03000000 01000000 00000000 01000000 00000000",  # a chunk without a new page
            "00000000 00000000 01000000 00000000 01000000 02000000",  # and one with two
            "05000000 06000000",  # the pages
            "03000000 07000000",  # the tokens
            "00000000 10000000 04000000",
            *["01010101"] * 8,
            *["02020202"] * 8,
            "01000000 09000000 01000000",
            *["00000000"] * 8,
            *["03030303"] * 8,
            "02000000 09000000 01000000 02000000 05000000 06000000",
            "03000000 09000000",
        ]
    )
