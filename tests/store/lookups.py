"""A reader for strace: `python -m tests.store.lookups STORE`. It says in the trace where each of its phases begins.

Its arguments are a store with blocks 0 to 99. It prints how many look-ups it made.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

from hpckv.store import StoreConfig, open_store
from hpckv.store.listing import _TICK_S
from hpckv.testing.tier_suite import GEOMETRY, make_block
from tests.store.shared_store import NAMESPACE

ROUNDS = 200
MARK = "/hpckv-tests-phase/"


def begin(phase: str) -> None:
    """A system call that nothing else makes."""
    with contextlib.suppress(FileNotFoundError):
        os.stat(MARK + phase)


def main(store: Path) -> int:
    tiers = open_store(StoreConfig(shared=str(store), write="all", local="none"), NAMESPACE, GEOMETRY)
    there, absent = ([make_block(first + n).key for n in range(100)] for first in (0, 1_000_000))
    time.sleep(_TICK_S + 0.1)
    catalog = tiers.tiers[-1].catalog
    catalog.refresh()  # from now on all folders are known not to change
    for phase in ("refresh", "refresh again"):
        begin(phase)
        catalog.refresh()
    begin("hits")
    found = [tiers.match(there[: n % 100 + 1]) for n in range(ROUNDS)]
    begin("misses")
    found += [tiers.match(absent) for _ in range(ROUNDS)]
    begin("end")
    assert found == [n % 100 + 1 for n in range(ROUNDS)] + [0] * ROUNDS
    assert tiers.load(make_block(7)) is not None  # what a call on the store looks like
    begin("over")
    tiers.close()
    return sum(found)


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
