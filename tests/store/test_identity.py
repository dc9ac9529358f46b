"""A changed anything is another namespace; a changed name is not."""

import json
import os

import pytest

from hpckv.errors import StoreError
from hpckv.store import BlockGeometry, Identity, Namespace, StoreConfig, open_store, weights_digest
from hpckv.store.segment import StoredBlock

CONFIG = {"hidden_size": 8, "rope_theta": 10000.0, "rope_scaling": None, "_name_or_path": "a"}
REPRESENTATION = {"dtype": "float32", "block_tokens": 16, "layers_per_tile": 4, "numerics": "fast"}
GEOMETRY = BlockGeometry(num_kv_heads=1, num_layers=1, block_tokens=16, head_dim=2, item_bytes=4)


def namespace(*, weights="w", config=CONFIG, representation=REPRESENTATION, **identity):
    return Namespace(Identity(weights=weights, config=config, **identity), representation)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "v"},
        {"config": {**CONFIG, "rope_theta": 10001.0}},
        {"config": {**CONFIG, "rope_scaling": {"factor": 2.0}}},
        {"config": {**CONFIG, "a_field_nobody_knows": 1}},
        {"quantization": "fp8-rowwise"},
        {"adapter": "lora"},
        {"representation": {**REPRESENTATION, "dtype": "bfloat16"}},
        {"representation": {**REPRESENTATION, "block_tokens": 64}},
        {"representation": {**REPRESENTATION, "layers_per_tile": 2}},
        {"representation": {**REPRESENTATION, "numerics": "strict"}},
    ],
)
def test_one_change_gives_another_namespace(change):
    assert namespace(**change).name != namespace().name
    changes_identity = "representation" not in change
    assert (namespace(**change).identity.digest != namespace().identity.digest) == changes_identity


def test_names_do_not_count():
    assert namespace(config={**CONFIG, "_name_or_path": "b"}).name == namespace().name


def test_the_weights_digest_is_of_content_alone(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.safetensors").write_bytes(b"1" * 1000)
    digest = weights_digest([tmp_path / "a" / "x.safetensors"])
    assert digest == weights_digest([tmp_path / "b" / "x.safetensors"])
    (tmp_path / "b" / "x.safetensors").write_bytes(b"1" * 999 + b"2")
    assert digest != weights_digest([tmp_path / "b" / "x.safetensors"])


def test_digests_are_remembered_and_never_believed_of_a_changed_file(tmp_path, monkeypatch):
    weights, memory = tmp_path / "x.safetensors", tmp_path / "cache" / "weights.json"
    weights.write_bytes(b"1" * 1000)
    plain = weights_digest([weights])
    assert weights_digest([weights], memory=memory) == plain
    assert not memory.exists()  # written just now: it may still change
    monkeypatch.setattr("hpckv.store.identity._SETTLED_NS", -1)
    assert weights_digest([weights], memory=memory) == plain
    assert memory.stat().st_mode & 0o777 == 0o600

    remembered = json.loads(memory.read_text())
    remembered[str(weights)]["digest"] = "00" * 32
    memory.write_text(json.dumps(remembered))
    assert weights_digest([weights], memory=memory) != plain  # it is not read again
    status = weights.stat()
    weights.write_bytes(b"2" * 1000)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same mtime
    other = weights_digest([weights])
    assert weights_digest([weights], memory=memory) == other != plain


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"x": 1}'])
def test_a_damaged_memory_is_no_memory(tmp_path, content):
    weights, memory = tmp_path / "x.safetensors", tmp_path / "weights.json"
    weights.write_bytes(b"1" * 1000)
    memory.write_bytes(content)
    assert weights_digest([weights], memory=memory) == weights_digest([weights])


def test_somebody_elses_memory_is_not_believed(tmp_path):
    weights, memory = tmp_path / "x.safetensors", tmp_path / "weights.json"
    weights.write_bytes(b"1" * 1000)
    status = weights.stat()
    signature = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    memory.write_text(json.dumps({str(weights): {"signature": signature, "digest": "00" * 32}}))
    memory.chmod(0o666)  # anybody could have written it
    assert weights_digest([weights], memory=memory) == weights_digest([weights])


def store(folder, **options):
    return open_store(StoreConfig(shared=str(folder), write="all", **options), namespace(), GEOMETRY)


def test_a_store_is_made_once_and_opened_again(tmp_path):
    first, second = store(tmp_path / "kv"), store(tmp_path / "kv")
    assert first.epoch_key == second.epoch_key
    identity = json.loads(next((tmp_path / "kv").glob("u/*/seg/*/identity.json")).read_text())
    assert identity["identity"]["weights"] == "w"
    assert oct((tmp_path / "kv" / "key" / "0.key").stat().st_mode)[-3:] == "640"


def test_a_block_passes_from_one_process_life_to_the_next_and_is_promoted(tmp_path):
    block = StoredBlock(b"k" * 32, bytes(32), 0, bytes(range(128)) * 2)
    first = store(tmp_path / "kv")
    assert first.save(block)
    first.close()
    second = store(tmp_path / "kv")
    found = second.load(block)
    assert (found.tier, bytes(found.payload), found.writer) == ("shared", block.payload, os.getuid())
    assert second.load(block)[0] == "host"
    second.close()


@pytest.mark.parametrize("damage", ["marker", "version", "key", "foreign", "identity"])
def test_a_damaged_or_foreign_store_is_refused_in_one_line(tmp_path, damage):
    folder = tmp_path / "kv"
    store(folder).close()
    if damage == "marker":
        (folder / "STORE.json").unlink()
        (folder / "STORE.json").write_text("{")
    elif damage == "version":
        (folder / "STORE.json").unlink()
        (folder / "STORE.json").write_text('{"format": "hpckv store", "version": 99}')
    elif damage == "key":
        (folder / "key" / "0.key").write_bytes(b"short")
    elif damage == "foreign":
        folder = tmp_path / "home"
        folder.mkdir()
        (folder / "thesis.tex").write_text("x")
    else:
        path = next(folder.glob("u/*/seg/*/identity.json"))
        os.chmod(path, 0o600)
        path.write_text("{}")
    with pytest.raises(StoreError) as caught:
        store(folder)
    assert "\n" not in str(caught.value)
