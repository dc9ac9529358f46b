"""A project's store in tests: made by its owner, written and read as whoever calls."""

import os
from pathlib import Path

from hpckv.quantity import ByteSize
from hpckv.store import Identity, Namespace, StoreConfig, TieredStore, open_store
from hpckv.store.policy import StorePolicy
from hpckv.testing.tier_suite import GEOMETRY, make_block
from tests.store.users import PROJECT

NAMESPACE = Namespace(Identity(weights="w", config={"a": 1}), {"dtype": "bfloat16"})


def policy(**changes) -> StorePolicy:
    return StorePolicy.new(**{"group": PROJECT, **changes})


def small_tiers(store: Path, **options) -> TieredStore:
    """A store whose segments hold three blocks, without host memory."""
    settings = {"write": "all", "host_size": ByteSize(0), "segment_size": ByteSize(3 * GEOMETRY.block_bytes), **options}
    return open_store(StoreConfig(shared=str(store), **settings), NAMESPACE, GEOMETRY)


def put(store: Path, numbers, **changes) -> list[str]:
    """Store blocks; this user's segments afterwards."""
    tiers = open_store(StoreConfig(shared=str(store), write="all", **changes), NAMESPACE, GEOMETRY)
    for number in numbers:
        tiers.save(make_block(number))
    tiers.close()
    return [str(p) for p in store.glob(f"u/{os.getuid()}/seg/*/*.h5")]


def get(store: Path, numbers, **changes) -> list[bool]:
    """Which blocks are found, each with the right bytes."""
    config = StoreConfig(**{"shared": str(store), "write": "off", "host_size": ByteSize(0), **changes})
    tiers = open_store(config, NAMESPACE, GEOMETRY)
    found = found_in(tiers, numbers)
    return [number in found for number in numbers]


def found_in(tiers: TieredStore, numbers) -> list[int]:
    """The blocks that are found, each with the right bytes; closes the tiers."""
    found = []
    for number in numbers:
        if loaded := tiers.load(make_block(number)):
            assert bytes(loaded.payload) == make_block(number).payload
            found.append(number)
    tiers.close()
    return found
