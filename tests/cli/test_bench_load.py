"""`hpckv bench load`: what it measures is what a run's policy decides by, and nothing of it stays."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hpckv.engine.load_bench import LoadBench
from hpckv.schema import convert
from hpckv.store.read_bench import TierReads
from hpckv.usage.rates import Rates
from tests.cli.runs import chat_lines, hpckv, write_run


def bench(prefill_s, read_s, **more):
    """Blocks of 64 tokens and 1 kB."""
    reads = TierReads("shared", "/kv", {tokens // 64: seconds for tokens, seconds in read_s.items()})
    found = LoadBench(
        "a GPU", "a model", "float16", 64, 1000, prefill_s, [reads], 1e4, 1e-3, 1e-4, 1e-7, 64, 5.0, 1, **more
    )
    return found, reads


@pytest.mark.parametrize(
    ("prefill_s", "read_s", "first"),
    [
        ({64: 1.0, 128: 2.0, 256: 4.0}, {64: 0.5, 128: 1.0, 256: 2.0}, 64),
        ({64: 1.0, 128: 2.0, 256: 4.0}, {64: 3.0, 128: 3.0, 256: 3.0}, 256),
        ({64: 1.0, 128: 2.0, 256: 4.0}, {64: 0.5, 128: 3.0, 256: 3.0}, 256),
        ({64: 1.0, 128: 2.0, 256: 4.0}, {64: 0.5, 128: 1.0, 256: 5.0}, None),
    ],
)
def test_the_crossover_is_the_length_from_which_on_loading_always_wins(prefill_s, read_s, first):
    found, reads = bench(prefill_s, read_s)
    assert found.crossover(reads) == first


def test_a_limited_rate_counts_as_in_a_run():
    found, reads = bench({64: 1.0}, {64: 0.1}, read_rate=500)
    assert (found.load_s(reads, 64), found.loads(reads, 64)) == (2.0, False)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def run_file(tmp_path, checkpoint):
    (tmp_path / "disk").mkdir()
    store = {"shared": str(tmp_path / "kv"), "local": str(tmp_path / "disk"), "host_size": "64MiB", "write": "all"}
    return write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(4), store=store)


def test_every_tier_is_measured_and_a_store_that_was_not_there_is_not_there_afterwards(tmp_path, run_file):
    before = files(tmp_path)
    done = hpckv("bench", "load", run_file, "--lengths", "33,64,100000", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["prefill_s"]) == ["32", "64"]  # whole blocks, and what fits the model
    assert list(found["tiers"]) == ["host", "local", "shared"]
    for tier in found["tiers"].values():
        assert tier["trouble"] == ""
        assert all(seconds > 0 for seconds in tier["load_s"].values())
        for tokens, loads in tier["loads"].items():
            assert loads == (tier["load_s"][tokens] <= found["prefill_s"][tokens])
    assert found["decode_tokens_per_s"] > 0
    assert files(tmp_path) == before


def test_a_store_that_is_there_keeps_what_it_has_and_nothing_else(tmp_path, run_file):
    assert hpckv("run", run_file).returncode == 0
    stored = [name for name in files(tmp_path) if name.endswith((".h5", ".idx", "identity.json"))]
    assert stored
    done = hpckv("bench", "load", run_file, "--lengths", "64", "--site-fragment")
    assert done.returncode == 0, done.stderr
    (rate,) = yaml.safe_load(done.stdout)["rates"]
    known = convert([rate], list[Rates], "the fragment")[0]  # what hpckv plan reads
    assert min(known.prefill_tokens_per_s, known.decode_tokens_per_s, known.start_s, known.load_bytes_per_s) > 0
    assert [name for name in files(tmp_path) if name.endswith((".h5", ".idx", "identity.json"))] == stored
    assert hpckv("store", "check", tmp_path / "kv").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lengths", "many"), "--lengths many: expected numbers of tokens"),
        (("--lengths", "3"), "none of these lengths can be measured: a block has 16 tokens"),
        (("--size", "lots"), "'lots' is not a size"),
    ],
)
def test_what_cannot_be_measured_is_one_line(run_file, arguments, said):
    done = hpckv("bench", "load", run_file, *arguments)
    assert done.returncode in (64, 78)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_without_a_store_has_nothing_to_load(tmp_path, checkpoint):
    done = hpckv("bench", "load", write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(1)))
    assert (done.returncode, done.stderr.count("\n")) == (64, 1)
    assert "without one there is nothing to load" in done.stderr


@pytest.mark.mpi
def test_ranks_of_one_model_measure_together(tmp_path, checkpoint):
    model = checkpoint("llama", tokenizer=True, num_key_value_heads=2)
    run_file = write_run(tmp_path, model, chat_lines(1), store={"shared": str(tmp_path / "kv"), "local": "none"})
    mpiexec = Path(sys.executable).parent / "mpiexec"
    command = [mpiexec, "-n", "2", sys.executable, "-m", "hpckv.cli.main", "bench", "load", run_file]
    more = ["--set", "parallel.tp=2", "--lengths", "32", "--json"]
    done = subprocess.run([*map(str, command), *more], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found, config = json.loads(done.stdout), json.loads((model / "config.json").read_text())
    size = 2 * config["num_hidden_layers"] * 16 * config["head_dim"] * 4
    assert found["block_bytes"] == size  # one of the two heads, in float32


def test_however_the_store_is_spelled_copies_on_this_node_stay(tmp_path, run_file):
    store = ["--set", f"store.shared={tmp_path}/kv/", "--set", f"store.local={tmp_path / 'disk'}"]
    assert hpckv("run", run_file, *store).returncode == 0
    assert hpckv("run", run_file, *store, "--output", tmp_path / "again").returncode == 0  # reads, and so copies
    before = [name for name in files(tmp_path / "disk") if name.endswith(".h5")]
    assert before
    assert hpckv("bench", "load", run_file, *store, "--lengths", "64").returncode == 0
    assert [name for name in files(tmp_path / "disk") if name.endswith(".h5")] == before
