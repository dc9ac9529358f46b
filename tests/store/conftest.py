"""A project's store, for tests with real users."""

import os
from pathlib import Path

import pytest

from hpckv.store.root import StoreRoot
from tests.store.shared_store import policy
from tests.store.users import OWNER, PROJECT, as_user, reachable


@pytest.fixture
def store(tmp_path_factory) -> Path:
    """A store of OWNER's for PROJECT."""
    folder = reachable(tmp_path_factory.mktemp("shared"))
    os.chown(folder, OWNER, PROJECT)
    as_user(OWNER, lambda: StoreRoot.create(folder / "kv", policy()) and None)
    return folder / "kv"
