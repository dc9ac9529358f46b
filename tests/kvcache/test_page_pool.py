"""Pages are in exactly one state, whatever happens; eviction spares what is held and prefers what nobody wants."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpckv.kvcache import PagePool


def key(number: int) -> bytes:
    return number.to_bytes(4, "little")


def test_unwanted_pages_go_before_wanted_ones_and_older_before_newer():
    wanted = {key(1)}
    pool = PagePool(6, is_wanted=lambda k: k in wanted)
    pages = [pool.allocate() for _ in range(4)]
    for number, page in enumerate(pages):
        pool.register(page, key(number))
    for page in (pages[1], pages[3], pages[0], pages[2]):
        pool.release(page)
    assert [pool.allocate() for _ in range(4)] == [pages[3], pages[0], pages[2], pages[1]]
    assert pool.allocate() is None
    assert pool.num_evicted == 4


def test_a_block_that_loses_its_last_use_becomes_evictable_first():
    wanted = {key(0), key(1)}
    pool = PagePool(4, is_wanted=lambda k: k in wanted)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, key(0))
    pool.register(second, key(1))
    pool.release(first)
    pool.release(second)
    assert pool.num_unwanted == 0
    wanted.remove(key(1))
    pool.recheck(key(1))
    assert pool.num_unwanted == 1
    assert pool.allocate() == second


def test_a_second_page_with_the_same_block_stays_private():
    pool = PagePool(4)
    first, second = pool.allocate(), pool.allocate()
    assert pool.register(first, key(0))
    assert not pool.register(second, key(0))
    pool.release(second)
    assert pool.find(key(0)) == first
    assert pool.num_available == 1
    pool.check_integrity()


class PoolMachine(RuleBasedStateMachine):
    """The pool against a dictionary of who holds what."""

    def __init__(self):
        super().__init__()
        self.wanted: set[bytes] = set()
        self.pool = PagePool(9, is_wanted=lambda k: k in self.wanted)
        self.held: list[int] = []

    @rule()
    def allocate(self):
        available = self.pool.num_available
        page = self.pool.allocate()
        assert (page is None) == (available == 0)
        if page is not None:
            assert page not in self.held
            self.held.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), number=st.integers(0, 9))
    def register(self, data, number):
        page = data.draw(st.sampled_from(self.held))
        if self.pool._key[page] is None:
            known = self.pool.find(key(number))
            assert self.pool.register(page, key(number)) == (known is None)

    @rule(number=st.integers(0, 9))
    def match(self, number):
        page = self.pool.find(key(number))
        if page is not None:
            self.pool.retain(page)
            self.held.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        page = data.draw(st.sampled_from(self.held))
        self.held.remove(page)
        self.pool.release(page)

    @rule(number=st.integers(0, 9))
    def want(self, number):
        self.wanted ^= {key(number)}
        self.pool.recheck(key(number))

    @invariant()
    def is_consistent(self):
        self.pool.check_integrity()
        assert self.pool.num_available == 7 - len(set(self.held))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
