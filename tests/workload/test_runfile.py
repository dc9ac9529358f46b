"""The run file: precedence, and one line that says where, what was expected, and the nearest right name."""

import pytest
import yaml

from hpckv.errors import ConfigError, MissingInputError
from hpckv.quantity import ByteSize
from hpckv.schema import to_plain
from hpckv.workload.runfile import load_run, site_local

MINIMAL = "model: {path: m}\ninput: in.jsonl\noutput: out\n"


def load(tmp_path, text=MINIMAL, **options):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_run(path, **options)


def test_the_interface_documents_example_is_read(tmp_path):
    config = load(
        tmp_path,
        """
model:    {path: models/llama-3.1-8b, dtype: auto, quantization: none}
input:    prompts.jsonl
output:   runs/eval-1
parallel: {tp: 1, pp: 1, replicas: 1}
cache:    {block_tokens: 64, device_memory: 0.9, kv_dtype: auto}
store:    {shared: /lustre/proj/kv, local: auto, local_size: 200GiB, host_size: 32GiB, read: true, write: planned}
engine:   {max_batch_tokens: 8192, max_requests: 256}
sampling: {max_tokens: 256, temperature: 0}
slurm:    {account: gk77, partition: gpu, time: "02:00:00", nodes: 1, gpus_per_node: 4, constraint: a100}
container: {image: hpckv.sif, runtime: apptainer, bind: []}
""",
    )
    assert config.store is not None
    assert config.store.host_size == ByteSize(32 * 1024**3)
    assert config.slurm is not None
    assert config.slurm.time == "02:00:00"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {path: m}", "modle: unknown key; did you mean 'model'?"),
        (
            MINIMAL + "engine: {max_batch_token: 1}",
            "engine.max_batch_token: unknown key; did you mean 'max_batch_tokens'?",
        ),
        (MINIMAL + "store: {shard: /x}", "store.shard: unknown key; did you mean 'shared'?"),
        (MINIMAL + "engine: {max_requests: many}", "engine.max_requests: Expected `int`, got `str`"),
        (MINIMAL + "engine: {numerics: exact}", "engine.numerics: Invalid enum value 'exact'"),
        (MINIMAL + "store: {shared: /x, host_size: 3 apples}", "store.host_size: '3 apples' is not a size"),
        (MINIMAL + "cache: {device_memory: 1.5}", "device_memory"),
        ("input: x\noutput: y", "model: is missing"),
        ("- a", "expected a mapping"),
        ("model: {path: m\ninput", "not valid YAML"),
        ("model: {path: m}\noutput: y", "input: is missing"),
        ("model: {path: m}\ninput: x\noutput: y\nengine: {numerics: exact}", "expected fast or strict"),
        ("model: {path: m}\ninput: x\noutput: y\nmodel: {path: n}", ":4: not valid YAML (model: stands twice)"),
    ],
)
def test_a_wrong_run_file_is_one_clear_line(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert "run.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flag_beats_environment_beats_file_beats_site(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("defaults: {engine: {max_requests: 1, seed: 1, chunk_tokens: 1}, store: {shared: /site}}\n")
    text = MINIMAL + f"site: {site}\nengine: {{max_requests: 2, seed: 2}}\n"
    config = load(
        tmp_path,
        text,
        flags={"output": "flag", "input": None},
        sets=["engine.seed=3"],
        environ={"HPCKV_RUN_DIR": "env", "HPCKV_STORE": "/env"},
    )
    assert (config.engine.max_requests, config.engine.seed, config.engine.chunk_tokens) == (2, 3, 1)
    assert (config.output, config.input) == ("flag", "in.jsonl")
    assert config.store is not None
    assert config.store.shared == "/env"


def test_a_wrong_set_flag_and_a_missing_file_are_said(tmp_path):
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        load(tmp_path, sets=["engine"])
    with pytest.raises(ConfigError, match="input is not a section"):
        load(tmp_path, sets=["input.x=1"])
    with pytest.raises(MissingInputError):
        load_run(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ("defaults: {strore: {}}", "site.yaml: defaults: strore: unknown key; did you mean 'store'?"),
        ("rates: [{gpu: cpu, prefil_tokens_per_s: 1, decode_tokens_per_s: 1}]", "did you mean 'prefill_tokens_per_s'?"),
        ("points: {prices: [{per_nod_hour: 1}]}", "did you mean 'per_node_hour'?"),
        (
            "rates: [{gpu: cpu, prefill_tokens_per_s: 0, decode_tokens_per_s: 1}]",
            "prefill_tokens_per_s: 0.0 is not above 0",
        ),
    ],
)
def test_a_mistake_in_a_site_file_is_said_to_be_there(tmp_path, site, said):
    (tmp_path / "site.yaml").write_text(site)
    (tmp_path / "run.yaml").write_text(f"{{model: {{path: m}}, input: x, output: y, site: {tmp_path}/site.yaml}}")
    with pytest.raises(ConfigError) as error:
        load_run(tmp_path / "run.yaml")
    assert said in str(error.value)
    assert f"{tmp_path}/site.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("run", "environ", "local", "site_local"),
    [
        ("{shared: /kv}", {}, "auto", "/scratch"),
        ("{shared: /kv, local: auto}", {}, "auto", "/scratch"),
        ("{shared: /kv, local: /mine}", {}, "/mine", "/scratch"),
        ("{shared: /kv, local: none}", {}, "none", "/scratch"),
        ("{shared: /kv}", {"HPCKV_LOCAL": "/env"}, "/env", "/scratch"),
    ],
)
def test_a_site_files_local_disk_is_one_of_the_places_that_auto_looks_at(tmp_path, run, environ, local, site_local):
    site = tmp_path / "site.yaml"
    site.write_text("defaults: {store: {local: /scratch}}\n")
    config = load(tmp_path, MINIMAL + f"site: {site}\nstore: {run}\n", environ=environ)
    assert config.store is not None
    assert (config.store.local, config.store.site_local) == (local, site_local)
    # What was resolved is read again by a job.
    again = load(tmp_path, yaml.safe_dump(to_plain(config)))
    assert again.store == config.store


def test_a_site_that_wants_no_copies_is_heard_where_the_run_file_says_nothing(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("defaults: {store: {local: none}}\n")
    config = load(tmp_path, MINIMAL + f"site: {site}\nstore: {{shared: /kv}}\n")
    assert config.store is not None
    assert (config.store.local, config.store.site_local) == ("none", None)


def test_a_site_file_without_a_place_for_a_store_asks_for_none(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("defaults: {store: {local: /scratch, host_size: 32GiB}}\n")
    assert load(tmp_path, MINIMAL + f"site: {site}\n").store is None


def test_a_site_files_local_disk_is_known_without_a_run_file(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("defaults: {store: {local: /scratch}}\n")
    assert site_local({"HPCKV_SITE": str(site)}) == "/scratch"
    site.write_text("defaults: {store: {local: none}}\n")
    assert site_local({"HPCKV_SITE": str(site)}) is None
    assert site_local({}) is None


@pytest.mark.parametrize(
    ("tmp", "local_size"),
    [
        ("200G", "100GiB"),
        ("50G", "50GiB"),
        ("51200", "50GiB"),
        (2048, "2GiB"),
        ("1t", "100GiB"),
        (0, "100GiB"),
        (None, "100GiB"),
    ],
)
def test_copies_on_a_nodes_disk_take_no_more_than_slurm_is_asked_for(tmp_path, tmp, local_size):
    slurm = "" if tmp is None else f"slurm: {{tmp: {tmp}}}\n"
    config = load(tmp_path, MINIMAL + f"store: {{shared: /kv, local_size: 100GiB}}\n{slurm}")
    assert config.store is not None
    assert str(config.store.local_size) == local_size


def test_the_flag_tmp_bounds_them_too(tmp_path):
    config = load(tmp_path, MINIMAL + "store: {shared: /kv}\n", flags={"slurm.tmp": "10G"})
    assert config.store is not None
    assert str(config.store.local_size) == "10GiB"
