"""Keys kept from step to step are those in the pages, whoever joins, leaves, moves or takes another's pages over."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpckv.attention import HeadShape, SequenceChunk, make_backend

SIZE, PAGES = 4, 60
SHAPE, WINDOWED = HeadShape(4, 2, 8, 0.3), HeadShape(4, 2, 8, 0.3, window=9)


class Decoding:
    """Sequences that decode a token a step over a pool of random pages."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.pools = [torch.randn(2, PAGES * SIZE, 2, 8, generator=self.generator) for _ in range(2)]
        self.free = list(range(2, PAGES))
        self.rng.shuffle(self.free)
        self.running: list[tuple[int, list[int], int]] = []
        self.num_admitted = 0

    def join(self, length: int) -> None:
        """A sequence of `length` keys in pages that another one may have had."""
        needed = -(-length // SIZE)
        if needed <= len(self.free):
            pages = [self.free.pop() for _ in range(needed)]
            self.num_admitted += 1
            for pool in self.pools:
                for page in pages:
                    new = torch.randn(2, SIZE, 2, 8, generator=self.generator)
                    pool[:, page * SIZE : (page + 1) * SIZE] = new
            self.running.append((self.num_admitted, pages, length))

    def leave(self, number: int) -> None:
        if self.running:
            _, pages, _ = self.running.pop(number % len(self.running))
            self.free += pages

    def grow(self) -> None:
        """Every sequence has one key more."""
        grown = []
        for owner, pages, length in self.running:
            if length % SIZE == 0:
                if not self.free:
                    continue
                pages.append(self.free.pop())
            slot = pages[length // SIZE] * SIZE + length % SIZE
            for pool in self.pools:
                pool[:, slot] = torch.randn(2, 2, 8, generator=self.generator)
            grown.append((owner, pages, length + 1))
        self.running = grown

    def chunks(self) -> list[SequenceChunk]:
        return [SequenceChunk(length - 1, 1, list(pages), owner) for owner, pages, length in self.running]


actions = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(1, 30)),
        st.tuples(st.just("leave"), st.integers(0, 5)),
        st.tuples(st.just("shuffle"), st.just(0)),
        st.tuples(st.just("skip"), st.integers(0, 1)),
        st.tuples(st.just("step"), st.just(0)),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(actions=actions, seed=st.integers(0, 1000), room=st.sampled_from([200, 100_000]))
def test_kept_keys_are_those_in_the_pages(actions, seed, room):
    device = torch.device("cpu")
    decoding = Decoding(seed)
    plain = make_backend("fast", block_tokens=SIZE, device=device)
    kept = make_backend("fast", block_tokens=SIZE, device=device, kept_tail_tokens=room)
    decoding.join(11)
    skipped = None
    for action, value in [*actions, ("step", 0)]:
        if action == "join":
            decoding.join(value)
        elif action == "leave":
            decoding.leave(value)
        elif action == "shuffle":
            decoding.rng.shuffle(decoding.running)
        elif action == "skip":  # a layer whose window binds takes no part in this step
            skipped = value
        if action not in ("step", "skip") or not decoding.running:
            continue
        decoding.grow()
        chunks = decoding.chunks()
        if not chunks:
            continue
        q = torch.randn(len(chunks), 4, 8, generator=decoding.generator)
        windows = frozenset({None, WINDOWED.window})
        plans = [backend.plan(chunks, windows) for backend in (plain, kept)]
        for layer, pool in enumerate(decoding.pools):
            if action == "skip" and layer == skipped:
                continue
            for shape in (SHAPE, WINDOWED) if layer == 0 else (SHAPE,):
                keys, values = pool
                wanted, found = (
                    backend.attend(q, keys, values, plan, shape)
                    for backend, plan in zip((plain, kept), plans, strict=True)
                )
                assert (found - wanted).abs().max() < 1e-5
