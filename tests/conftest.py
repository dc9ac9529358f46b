"""Shared fixtures: tiny checkpoints (made once a session), one thread of arithmetic noise less, integrity after every test."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpckv.testing.tiny_model import make_checkpoint, make_tokenizer

# What the package remembers between processes goes with the session, not into the user's home.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="hpckv-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _no_memory_left_behind() -> Iterator[None]:
    """MPI ranks that are killed, as many tests do, leave their shared memory."""
    before = set(_shared_memory())
    yield
    mapped = "".join(map(_text, Path("/proc").glob("[0-9]*/maps")))
    for path in set(_shared_memory()) - before:
        if path.name not in mapped:
            path.unlink(missing_ok=True)


def _shared_memory() -> Iterator[Path]:
    for names in ("mpich_shm_*", "ucx_shm_*"):
        yield from Path("/dev/shm").glob(names)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended, or is another user's
        return ""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(family, seed=..., tokenizer=..., **config): a folder, made on first use."""
    made: dict[str, Path] = {}

    def get(family: str = "llama", *, tokenizer: bool = False, **options: Any) -> Path:
        name = json.dumps([family, tokenizer, options], sort_keys=True)
        if name not in made:
            made[name] = make_checkpoint(tmp_path_factory.mktemp(family), family, **options)
            if tokenizer:
                make_tokenizer(made[name])
        return made[name]

    return get


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run the long forms too (make soak)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is not part of this run is deselected, not skipped: long forms, and real users where we are not root."""
    left_out = set() if config.getoption("--runslow") else {"slow"}
    if os.geteuid() and not os.environ.get("CI"):
        left_out.add("root")
    chosen = [item for item in items if left_out.isdisjoint(mark.name for mark in item.iter_markers())]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.fixture(autouse=True)
def _device_checks(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")
