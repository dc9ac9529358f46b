"""What an engine says of itself to the store: complete, and the modes that follow from it."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from hpckv.engine.config import EngineConfig
from hpckv.engine.engine import Engine
from hpckv.engine.request import SamplingParams
from hpckv.kvcache import CacheConfig
from hpckv.model import ModelSettings
from hpckv.store import StoreConfig

CACHE = CacheConfig(block_tokens=8, device_memory="1MiB")
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
PROMPTS = [[3 + (7 * n) % 100 for n in range(40)] + [k] for k in range(5)]


def run(folder, store, *, dtype="auto", cache=CACHE, config=None, **changes):
    """Blocks that came from the store, blocks that were bridged, and the tokens."""
    settings = ModelSettings(path=str(folder), dtype=dtype)
    given = {"shared": str(store), "write": "all", "host_size": 0, **changes}
    engine = Engine(settings, store=StoreConfig(**given), cache=cache, engine=config)
    found = [answer.token_ids for answer in engine.generate(PROMPTS, PARAMS)]
    engine.close()
    return sum(engine.cache.stats.onboarded.values()), engine.bridged_blocks, found


def changed(folder, tmp_path, change):
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    if change == "one tensor":
        file = copy / "model.safetensors"
        tensors = load_file(file)
        name = sorted(tensors)[-1]
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] += 1e-3
        save_file(tensors, file)
    elif change is not None:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **change}))
    return copy


@pytest.mark.parametrize(
    ("change", "hits"),
    [
        (None, True),
        ({"_name_or_path": "elsewhere"}, True),
        ("one tensor", False),
        ({"rope_theta": 77777.0}, False),
        ({"rms_norm_eps": 2e-5}, False),
        ({"a_field_nobody_knows": 1}, False),
    ],
)
def test_another_model_is_a_miss_the_same_elsewhere_is_a_hit(checkpoint, tmp_path, change, hits):
    folder = checkpoint("llama")
    run(folder, tmp_path / "kv")
    loaded, bridged, _ = run(changed(folder, tmp_path, change), tmp_path / "kv")
    assert (loaded > 0) == hits
    assert bridged == 0


@pytest.mark.parametrize(
    ("change", "hits"),
    [
        ({"config": EngineConfig(max_batch_tokens=16)}, True),
        ({"config": EngineConfig(numerics="strict")}, False),
        ({"cache": CacheConfig(block_tokens=16, device_memory="1MiB")}, False),
        ({"dtype": "bfloat16"}, False),
        ({"private": True}, False),
        ({"read": False}, False),
    ],
)
def test_another_setting_is_a_miss_unless_it_decides_nothing(checkpoint, tmp_path, change, hits):
    folder = checkpoint("llama")
    run(folder, tmp_path / "kv")
    loaded, _, _ = run(folder, tmp_path / "kv", **change)
    assert (loaded > 0) == hits


def test_another_dtypes_blocks_are_used_declared_and_go_no_further(checkpoint, tmp_path):
    folder = checkpoint("llama")
    run(folder, tmp_path / "kv", dtype="bfloat16")
    before = sorted((tmp_path / "kv").rglob("*.h5"))
    loaded, bridged, _ = run(folder, tmp_path / "kv", dtype="float32")
    assert loaded == bridged > 0
    assert sorted((tmp_path / "kv").rglob("*.h5")) == before
    plain = run(folder, tmp_path / "kv", dtype="float32", bridging="off")
    assert plain[:2] == (0, 0)


def test_private_runs_of_one_user_share_among_themselves(checkpoint, tmp_path):
    folder = checkpoint("llama")
    first = run(folder, tmp_path / "kv", private=True)
    second = run(folder, tmp_path / "kv", private=True)
    assert second[0] > 0
    assert second[2] == first[2]
    assert run(folder, tmp_path / "kv")[0] == 0
