"""A member whose blocks verify and are wrong all the same is found out, and no answer given after that is wrong."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from hpckv.engine.engine import Engine
from hpckv.engine.request import SamplingParams
from hpckv.kvcache import CacheConfig
from hpckv.store import StoreConfig
from hpckv.store.audit import relative_error
from hpckv.store.inspect import audit_reports
from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.store.survey import Survey

CACHE = CacheConfig(block_tokens=8, device_memory="1MiB")
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture
def store(tmp_path) -> Path:
    StoreRoot.create(tmp_path / "kv", StorePolicy.new(group=os.getgid()))
    return tmp_path / "kv"


def prompts(count: int = 12) -> list[list[int]]:
    rng = random.Random(6)
    head = rng.choices(range(3, 120), k=64)
    return [head + rng.choices(range(3, 120), k=9) for _ in range(count)]


def engine(folder, store=None, **changes) -> Engine:
    config = store and StoreConfig(shared=str(store), **{"write": "all", "audit": 0.0, **changes})
    return Engine(folder, store=config, cache=CACHE)


def tokens(engine: Engine) -> list[list[int]]:
    found = [answer.token_ids for answer in engine.generate(prompts(), PARAMS)]
    engine.cache.check_integrity(engine.scheduler.running)
    engine.close()
    return found


def test_right_blocks_pass(checkpoint, store):
    folder = checkpoint("llama")
    wanted = tokens(engine(folder, store))
    audited = engine(folder, store, audit=1.0)
    assert tokens(audited) == wanted
    assert audited.store.auditor.stats.requests == 12
    assert audited.store.auditor.stats.blocks >= 12 * 8
    assert audited.store.auditor.stats.mismatches == 0
    assert not list(store.glob("u/*/audit/*"))


def poison(folder, store) -> None:
    """Fill the store with blocks of another prompt's content, sealed and verified as any."""
    writer = engine(folder, store)
    real = writer.runner.pool.read_block

    def wrong(page):
        values = np.frombuffer(real(page), np.float32)
        return memoryview((values * np.float32(-1)).view(np.uint8).data)

    writer.runner.pool.read_block = wrong
    tokens(writer)


def test_a_wrong_writer_is_found_out_and_no_answer_stays_wrong(checkpoint, store, caplog):
    folder = checkpoint("llama")
    wanted = tokens(engine(folder))
    poison(folder, store)
    assert tokens(engine(folder, store)) != wanted, "the poison must be felt, or this proves nothing"

    first = engine(folder, store, audit=1.0)  # every request checks for itself: none is answered from the store
    assert tokens(first) == wanted
    assert first.store.auditor.stats.mismatches >= 1
    (report, *_) = [json.loads(path.read_text()) for path in store.glob("u/*/audit/*.json")]
    assert report["writer"] == os.getuid()
    assert report["block"] == 0
    assert "hpckv store distrust" in caplog.text
    survey = Survey(StoreRoot.open(store).layout)
    survey.refresh()
    assert audit_reports(survey) == {os.getuid(): [os.getuid()]}


def test_what_is_unfinished_begins_again(checkpoint, store):
    folder = checkpoint("llama")
    wanted = tokens(engine(folder))
    poison(folder, store)
    running = engine(folder, store, audit=1e-9, write="off")
    auditor = running.store.auditor
    first_in_plan = str(min(range(12), key=lambda n: prompts()[n]))
    auditor.wants = lambda request_id: request_id == first_in_plan  # the others use what the store gives them
    waiting = auditor.submit

    def submit(keys, computed):
        waiting(keys, computed)
        auditor.finish(30)  # so that the verdict is there before the next step

    auditor.submit = submit
    found = tokens(running)
    assert auditor.stats.mismatches == 1
    assert found == wanted


def test_what_was_computed_on_wrong_blocks_is_taken_back(checkpoint, store):
    folder = checkpoint("llama")
    wanted = tokens(engine(folder))
    poison(folder, store)
    poisoned = {path.name for path in store.rglob("*.h5")}
    longer = SamplingParams(max_tokens=20, ignore_eos=True, n=2, temperature=1.0)
    running = engine(folder, store, audit=1e-9, seal_s=0.01)  # what it computes is published at once
    running.store.auditor.wants = lambda request_id: request_id == "11"
    right = [answer.token_ids for answer in engine(folder).generate(prompts(), longer)]
    found = list(running.generate(prompts(), longer))
    auditor = running.store.auditor
    running.close()
    assert auditor.stats.mismatches == 1
    # What was answered before is lost, what was unanswered is right, and nothing wrong is left of this run.
    assert [a.token_ids for a in found][-1] == right[-1]
    for path in store.rglob("*.h5"):
        if path.name in poisoned:
            path.unlink()
    assert tokens(engine(folder, store)) == wanted


def test_a_private_store_is_not_audited(checkpoint, tmp_path):
    plain = engine(checkpoint("llama"), tmp_path / "own", audit=1.0)
    assert plain.store.auditor is None
    plain.close()


def test_the_sample_is_of_the_size_asked_for(checkpoint, store):
    audited = engine(checkpoint("llama"), store, audit=0.1)
    chosen = sum(audited.store.auditor.wants(f"request-{n}") for n in range(5000))
    assert 400 < chosen < 600
    audited.close()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_relative_error(dtype):
    a = np.linspace(-1, 1, 64).astype(dtype)
    b = a.copy()
    assert relative_error(memoryview(a.view(np.uint8).data), memoryview(b.view(np.uint8).data), dtype) == 0
    b[3] += 1
    error = relative_error(memoryview(a.view(np.uint8).data), memoryview(b.view(np.uint8).data), dtype)
    assert error == pytest.approx(1 / np.linalg.norm(b.astype(np.float64)), rel=1e-2)
    b[3] = np.nan
    assert relative_error(memoryview(b.view(np.uint8).data), memoryview(a.view(np.uint8).data), dtype) == float("inf")
