"""Help and imports on a login node: an example in every --help, torch nowhere."""

import json
import subprocess
import sys

import pytest

from hpckv.cli.app import VERBS as VERB_HOMES
from tests.cli.runs import hpckv

VERBS = [
    [],
    ["run"],
    ["submit"],
    ["status"],
    ["cancel"],
    ["lint"],
    ["acct"],
    ["plan"],
    ["doctor"],
    ["model"],
    ["model", "info"],
    ["model", "stage"],
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_works_without_torch(verb):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"sys.argv = ['hpckv', *{verb!r}, '--help']\n"
        "from hpckv.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    if verb != ["model"]:
        assert "Example: hpckv" in done.stdout


def test_import_and_lazy_names_import_no_torch_until_used():
    code = (
        "import sys, hpckv; from hpckv import SamplingParams; SamplingParams(max_tokens=3)\n"
        "assert 'torch' not in sys.modules; from hpckv import Engine; assert 'torch' in sys.modules; print(Engine)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_version():
    assert hpckv("--version").stdout.startswith("hpckv 0.")


def test_model_info_knows_sizes(checkpoint):
    folder = checkpoint("llama")
    record = json.loads(hpckv("model", "info", folder, "--json").stdout)
    assert record["kv_bytes_per_token"]["float16"] == 2 * 3 * 3 * 80 * 2
    assert record["tp"] == [1]
    table = hpckv("model", "info", folder)
    assert table.returncode == 0
    assert "LlamaForCausalLM" in table.stdout


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_the_parameter_count_is_that_of_the_file(family, checkpoint):
    from safetensors import safe_open

    from hpckv.model import read_config

    folder = checkpoint(family)
    with safe_open(folder / "model.safetensors", "np") as file:
        wanted = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    assert read_config(folder).num_parameters == wanted


def test_a_command_imports_no_other_command_s_parts():
    code = (
        "import sys; sys.argv = ['hpckv', 'acct', '--help']\n"
        "from hpckv.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'numpy', 'h5py', 'hpckv.cli.run', 'rich.progress'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_all_verbs_are_listed_with_what_they_do_and_a_wrong_one_is_answered_with_the_nearest():
    listed = hpckv("--help").stdout.partition("Commands:")[2].splitlines()
    assert [line.split()[0] for line in listed if line] == list(VERB_HOMES)
    assert all(len(line.split()) > 3 for line in listed if line)
    wrong = hpckv("storr")
    assert (wrong.returncode, "Did you mean 'store'?" in wrong.stderr) == (64, True)


def test_every_name_of_the_store_package_is_there():
    import hpckv.store

    assert all(getattr(hpckv.store, name) for name in hpckv.store.__all__)
