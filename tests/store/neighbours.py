"""A few users' processes on one store through two mounts of it: writers, readers, collectors, compactors, all at once.

As a program (`python -m tests.store.neighbours A B BRICK STALENESS SECONDS`) it lets them run and prints what they saw. It is
one small process that forks, so that a dozen of them start in no time.
"""

import contextlib
import errno
import functools
import inspect
import itertools
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hpckv.quantity import ByteSize
from hpckv.store import Identity, Namespace, StoreConfig, open_store
from hpckv.store.catalog import Catalog
from hpckv.store.collect import Collector
from hpckv.store.compact import compact
from hpckv.store.file_tier import FileTier
from hpckv.store.inspect import check, seal_of
from hpckv.store.policy import Quota, StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.store.segment import Segment, StoredBlock
from hpckv.store.survey import StoredFile, Survey
from hpckv.testing import tier_suite
from hpckv.testing.tier_suite import GEOMETRY
from tests.store.users import MEMBER, OTHER, OWNER, PROJECT, as_user, start_as

NAMESPACE = Namespace(Identity(weights="w", config={"a": 1}), {"dtype": "bfloat16", "block_tokens": 4})
SEGMENT_BLOCKS = 4
NUMBERS = {MEMBER: 0, OTHER: 1_000_000}
"""Where each writer's blocks begin."""
MOST = 3_000
"""Of each writer's blocks, so many are looked for."""
AT_LEAST = 100
"""A writer offers so many however slow the machine is: more than its quota."""
REFRESH_S: float = inspect.signature(FileTier).parameters["refresh_s"].default
_CALLS = ("open", "preadv", "fstat", "stat", "lstat", "scandir", "unlink", "rename", "writev", "fsync")


@functools.cache
def block_of(number: int) -> StoredBlock:
    return tier_suite.make_block(number)


def open_tiers(store: Path, **options):
    size = ByteSize(SEGMENT_BLOCKS * GEOMETRY.block_bytes)
    settings = {"write": "all", "segment_size": size, "host_size": ByteSize(0), "local": "none", **options}
    return open_store(StoreConfig(shared=str(store), **settings), NAMESPACE, GEOMETRY)


def count_errors(replace: Callable[[object, str, object], None] = setattr) -> Counter[str]:
    """What the system answers to this process from now on, when it is an error: call and name of the error."""
    seen = Counter[str]()

    def counted(name: str, real):
        def call(*args, **options):
            try:
                return real(*args, **options)
            except OSError as error:
                seen[f"{name} {errno.errorcode[error.errno]}"] += 1
                raise

        return call

    for name in _CALLS:
        replace(os, name, counted(name, getattr(os, name)))
    return seen


def numbers_in(root: StoreRoot, file: StoredFile) -> set[int]:
    """Blocks of a segment; none if it is gone."""
    with contextlib.suppress(OSError):
        segment = Segment(file.path, seal_of(root, file), frozenset({file.uid}))
        return {int.from_bytes(segment.key(row)[:16], "little") for row in range(segment.count)}
    return set()


def log_collected() -> set[int]:
    """What this process's collectors delete from now on."""
    collected, delete = set[int](), Collector._delete

    def logged(self: Collector, file: StoredFile) -> bool:
        held = numbers_in(self._root, file) if file.kind == "segment" else set()
        done = delete(self, file)
        collected.update(held if done else ())
        return done

    Collector._delete = logged
    return collected


class Reader:
    """Loads blocks and compares every byte."""

    def __init__(self, store: Path) -> None:
        self.tiers = open_tiers(store)
        self.hits = self.wrong = 0

    def load(self, number: int) -> bool:
        if not (loaded := self.tiers.load(block_of(number))):
            return False
        self.hits += 1
        self.wrong += bytes(loaded.payload) != block_of(number).payload
        return True

    @property
    def shared(self) -> FileTier:
        return self.tiers.tiers[-1]


def write(store: Path, seconds: float) -> dict:
    """Jobs one after another: new blocks, a look at some of them, tidying up at the end."""
    errors, collected, acknowledged = count_errors(), log_collected(), dict[int, float]()
    number, end, totals = NUMBERS[os.getuid()], time.monotonic() + seconds, Counter[str]()
    while time.monotonic() < end or number < NUMBERS[os.getuid()] + AT_LEAST:
        reader = Reader(store)
        for _ in range(4):
            part = range(number, number + 3 * SEGMENT_BLOCKS)
            for n in part:
                reader.tiers.save(block_of(n))
            reader.tiers.flush()
            now = time.time()
            acknowledged.update((n, now) for n in part if reader.shared.catalog.present([block_of(n).key])[0])
            number = part.stop
            for n in random.sample([*acknowledged], min(3, len(acknowledged))):
                reader.load(n)
        reader.tiers.close()
        totals.update(hits=reader.hits, wrong=reader.wrong, given_up=not reader.shared._writer.is_writing)
    return {**totals, "acknowledged": acknowledged, "collected": [*collected], "errors": errors}


def read(store: Path, seconds: float, until_told: int | None = None) -> dict:
    """Load what is believed to be there, and some of what is not; in jobs of 2 s, or in one until told what to find."""
    errors, collected, totals = count_errors(), log_collected(), Counter[str]()
    every = [base + n for base in NUMBERS.values() for n in range(MOST)]
    keys = [block_of(n).key for n in every]
    end, report = time.monotonic() + seconds, dict[str, object]()
    while time.monotonic() < end:
        reader = Reader(store)
        news = follow_news(reader.shared.catalog, every, keys)
        job_end = end if until_told is not None else min(end, time.monotonic() + 2.0)
        while time.monotonic() < job_end:
            present = [n for n, is_there in zip(every, reader.shared.present(keys), strict=True) if is_there]
            for number in random.sample(present, min(20, len(present))) + random.sample(every, 2):
                reader.load(number)
            time.sleep(0.02)
        if until_told is not None:
            report = {"news": news, "not_found": _not_found(reader, json.loads(os.read(until_told, 1 << 20)))}
        totals.update(hits=reader.hits, wrong=reader.wrong, **reader.shared.stats.misses)
        reader.tiers.close()
    return {**report, **totals, "collected": [*collected], "errors": errors}


def follow_news(catalog: Catalog, numbers: list[int], keys: list[bytes]) -> list[dict]:
    """Of each refresh from now on: when it began and ended, and which blocks it brought."""
    refresh, news, known = catalog.refresh, [], set[int]()

    def followed() -> None:
        begun = time.time()
        refresh()
        present = {n for n, is_there in zip(numbers, catalog.present(keys), strict=True) if is_there}
        news.append({"begun": begun, "ended": time.time(), "new": sorted(present - known)})
        known.update(present)

    catalog.refresh = followed
    return news


def late(acknowledged: dict[int, float], news: list[dict], staleness_s: float) -> list[int]:
    """Blocks that the first refresh after they were acknowledged should have brought, and a later one did."""
    found = []
    for before, this in itertools.pairwise(news):
        found += [n for n in this["new"] if acknowledged.get(n, math.inf) + staleness_s < before["begun"]]
    return found


def _not_found(reader: Reader, wanted: list[int]) -> list[int]:
    """Which of these cannot be read, although there was time to hear of them."""
    keys, end = [block_of(n).key for n in wanted], time.monotonic() + 2 * REFRESH_S
    while not reader.shared.present(keys).all() and time.monotonic() < end:
        time.sleep(0.05)
    return [n for n in wanted if not reader.load(n)]


def tend(store: Path, seconds: float) -> dict:
    """Collect, compact and index, again and again."""
    errors, collected, counts = count_errors(), log_collected(), Counter[str]()
    root, end = StoreRoot.open(store), time.monotonic() + seconds
    collector = Collector(root)
    tiers = open_tiers(store)
    catalog = tiers.tiers[-1].catalog
    while (now := time.monotonic()) < end or (not counts["compacted"] and now < end + 30.0):
        collector.collect()
        counts["compacted"] += compact(root, target_bytes=3 * SEGMENT_BLOCKS * GEOMETRY.block_bytes).read_segments
        catalog.refresh()
        counts["indexes"] += catalog.consolidate(os.getuid(), at_least=4, gid=PROJECT) is not None
        time.sleep(0.1)
    tiers.close()
    return {**counts, "collected": [*collected], "errors": errors}


def survey(store: Path) -> tuple[StoreRoot, Survey]:
    root = StoreRoot.open(store)
    found = Survey(root.layout)
    found.refresh()
    return root, found


def run(a: Path, b: Path, brick: Path, staleness_s: float, seconds: float) -> dict:
    """Everybody at once on the store `a` = `b` = `brick`, then a look from behind at what is really there.

    A client may show what another changed as it was for `staleness_s`.
    """
    quota = Quota(user_bytes=ByteSize(120_000), files=100)
    as_user(OWNER, lambda: StoreRoot.create(a, StorePolicy.new(group=PROJECT, quota=quota)) and None)
    told, tell = os.pipe()
    roles = {
        "writer on a": start_as(MEMBER, lambda: write(a, seconds)),
        "writer on b": start_as(OTHER, lambda: write(b, seconds)),
        "reader on b": start_as(OTHER, lambda: read(b, seconds + 1.0, told)),
        "jobs on b": start_as(OWNER, lambda: read(b, seconds)),
        "tending on a": start_as(MEMBER, lambda: tend(a, seconds)),
        "tending on b": start_as(MEMBER, lambda: tend(b, seconds)),
    }
    stands = set[int]()
    try:
        saw = {name: wait() for name, wait in roles.items() if name != "reader on b"}
        root, found = survey(brick)
        stands.update(*(numbers_in(root, file) for file in found.segments()))
    finally:
        os.write(tell, json.dumps(sorted(stands)).encode())
    saw["reader on b"] = roles["reader on b"]()
    acknowledged = {int(n): at for one in saw.values() for n, at in one.pop("acknowledged", {}).items()}
    collected = {n for one in saw.values() for n in one.pop("collected")}
    news = saw["reader on b"].pop("news")
    waits = [one["ended"] - acknowledged[n] for one in news for n in one["new"] if n in acknowledged]
    return {
        "acknowledged": len(acknowledged),
        "collected": len(collected),
        "standing": len(stands),
        "lost": sorted(acknowledged.keys() - collected - stands),
        "late": late(acknowledged, news, staleness_s),
        "seconds_until_seen": sorted(waits),
        "findings": [f"{f.file.path.name}: {f.what}" for f in check(*survey(brick)).findings],
        "saw": saw,
    }


if __name__ == "__main__":
    mounts = [Path(argument) for argument in sys.argv[1:4]]
    print(json.dumps(run(*mounts, *map(float, sys.argv[4:]))))
