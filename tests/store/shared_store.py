"""A project's store in tests: made by its owner, written and read as whoever calls."""

import os
from pathlib import Path

from hpckv.quantity import ByteSize
from hpckv.store import Identity, Namespace, StoreConfig, open_store
from hpckv.store.policy import StorePolicy
from hpckv.testing.tier_suite import GEOMETRY, make_block
from tests.store.users import PROJECT

NAMESPACE = Namespace(Identity(weights="w", config={"a": 1}), {"dtype": "bfloat16"})


def policy(**changes) -> StorePolicy:
    return StorePolicy.new(**{"group": PROJECT, **changes})


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
    found = []
    for number in numbers:
        loaded = tiers.load(make_block(number))
        assert not loaded or bytes(loaded.payload) == make_block(number).payload
        found.append(loaded is not None)
    tiers.close()
    return found
