"""`hpckv plan`: what it costs is said, and refused where it is too much, before anything is submitted."""

import json

import pytest

from tests.cli.runs import chat_lines, hpckv, write_run

SITE = {
    "points": {
        "prices": [
            {"partition": "gpu", "gpu": "A100", "per_gpu_hour": 3.0},
            {"partition": "gpu", "gpu": "H100", "per_gpu_hour": 9.0, "since": "2020-01-01"},
        ]
    },
    "rates": [
        {"gpu": "A100", "prefill_tokens_per_s": 100, "decode_tokens_per_s": 10, "start_s": 36},
        {"gpu": "H100", "prefill_tokens_per_s": 400, "decode_tokens_per_s": 40, "decode_step_s": 0.5},
    ],
}


@pytest.fixture
def run_file(tmp_path, checkpoint):
    (tmp_path / "site.yaml").write_text(json.dumps(SITE))
    return write_run(
        tmp_path,
        checkpoint("llama", tokenizer=True),
        chat_lines(10),
        site=str(tmp_path / "site.yaml"),
        slurm={"partition": "gpu", "max_points": 5.0, "points_per_node_hour": 7.0},
        sampling={"max_tokens": 9},
    )


def test_time_and_points_are_those_of_the_sites_rates_and_prices(run_file):
    done = hpckv("plan", run_file, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    a100, h100 = found["gpus"]
    assert (a100["gpu"], a100["rates"], h100["gpu"]) == ("A100", "site", "H100")
    computed = a100["computed_tokens"]
    assert computed == found["distinct_tokens"] < found["prompt_tokens"]
    assert found["output_tokens"] == 90
    assert a100["seconds"] == pytest.approx(36 + computed / 100 + 9, abs=0.06)
    assert h100["seconds"] == pytest.approx(computed / 400 + 90 / 40 + 8 * 0.5, abs=0.06)
    assert a100["points"] == pytest.approx(3 * a100["seconds"] / 3600, rel=0.01)
    assert h100["points"] == pytest.approx(9 * h100["seconds"] / 3600, rel=0.01)
    assert a100["time"] == "00:05:00"


def test_several_gpus_cost_several_times_and_replicas_share_the_work(run_file):
    one = json.loads(hpckv("plan", run_file, "--gpu", "H100", "--json").stdout)["gpus"][0]
    two = json.loads(hpckv("plan", run_file, "--gpu", "H100", "--set", "parallel.replicas=2", "--json").stdout)["gpus"][
        0
    ]
    assert two["num_gpus"] == 2
    assert two["seconds"] < one["seconds"]
    assert two["gpu_seconds"] == pytest.approx(2 * two["seconds"], abs=0.2)


def test_a_run_beyond_its_budget_is_refused(run_file):
    done = hpckv("plan", run_file, "--set", "slurm.max_points=0.01")
    assert done.returncode == 77
    assert done.stderr == "hpckv: A100, H100: more than slurm.max_points: 0.01\n"
    assert "A100" in done.stdout


@pytest.mark.parametrize(
    ("setting", "kinds"),
    [
        ("gpus_per_node=A100:4", ["A100"]),
        ("gres=gpu:h100:4", ["H100"]),
        ("gres=gpu:nvidia_h100_80gb_hbm3:4", ["H100"]),
        ("constraint=a100&(ib|80gb)", ["A100"]),
        ('constraint="[v100*2|a100*2]"', ["V100 16GB", "V100 32GB", "A100"]),  # one that nobody measured is estimated
        ("constraint=h200", ["H200 141GB"]),
        ("constraint=a10|bigmem", ["A100", "H100"]),  # no kind that is known
        ("gpus_per_node=4", ["A100", "H100"]),
    ],
)
def test_the_kinds_of_gpu_are_those_that_the_run_file_asks_for(run_file, setting, kinds):
    found = json.loads(hpckv("plan", run_file, "--set", f"slurm.{setting}", "--json").stdout)
    assert [cost["gpu"] for cost in found["gpus"]] == kinds


def test_the_budget_is_that_of_the_kind_that_the_run_file_asks_for(run_file):
    limit = ["--set", "slurm.max_points=0.04"]  # between what the two kinds cost
    both = hpckv("plan", run_file, *limit)
    assert (both.returncode, both.stderr) == (0, "hpckv: A100: more than slurm.max_points: 0.04\n")
    asked = hpckv("plan", run_file, *limit, "--set", "slurm.constraint=a100")
    assert (asked.returncode, asked.stderr) == (77, both.stderr)
    other = hpckv("plan", run_file, *limit, "--set", "slurm.constraint=a100", "--gpu", "H100")
    assert (other.returncode, other.stderr) == (0, "")


def test_without_prices_by_gpu_a_node_costs_what_the_run_file_says(run_file):
    flags = ["--gpu", "V100", "--set", "slurm.nodes=2", "--set", "parallel.replicas=2", "--json"]
    found = json.loads(hpckv("plan", run_file, *flags).stdout)["gpus"][0]
    assert found["rates"] == "estimated"
    assert found["points"] == pytest.approx(2 * 7 * found["seconds"] / 3600, abs=1e-3)


def test_fewer_answer_tokens_are_expected_if_that_is_said(run_file):
    found = json.loads(hpckv("plan", run_file, "--output-tokens", 3, "--json").stdout)
    assert found["output_tokens"] == 30
    assert "30 as expected" in hpckv("plan", run_file, "--output-tokens", 3).stdout


def test_rates_of_earlier_runs_are_used_and_said(run_file, tmp_path):
    own = [
        "--set",
        f"store.shared={tmp_path / 'kv'}",
        "--set",
        "sampling.max_tokens=60",
        "--set",
        "sampling.ignore_eos=true",
    ]
    assert hpckv("run", run_file, *own).returncode == 0
    found = json.loads(hpckv("plan", run_file, "--output", tmp_path / "next", *own, "--json").stdout)
    assert [(one["gpu"], one["rates"]) for one in found["gpus"]] == [
        ("A100", "site"),
        ("H100", "site"),
        ("cpu", "ledger"),
    ]
    assert found["gpus"][2]["seconds"] > 0
    assert found["gpus"][2]["cached"]["shared"] > 0


def big_model(folder):
    """70.6 billion parameters in bfloat16, with no file that has them."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "head_dim": 128,
    }  # fmt: skip
    (folder / "big").mkdir()
    (folder / "big" / "config.json").write_text(json.dumps(config))
    return folder / "big"


ONE_LINE = [{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": [1, 2, 3]}}]


def test_an_estimate_counts_the_start(tmp_path):
    run_file = write_run(tmp_path, big_model(tmp_path), ONE_LINE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "output.jsonl").write_text('{"custom_id": "a"}\n')  # nothing is left but that
    for ranks, seconds in ((4, 50.3), (8, 32.6)):
        found = json.loads(hpckv("plan", run_file, "--gpu", "H200", "--set", f"parallel.tp={ranks}", "--json").stdout)
        (cost,) = found["gpus"]
        assert (cost["rates"], cost["num_gpus"]) == ("estimated", ranks)
        assert cost["seconds"] == pytest.approx(seconds, abs=0.1)  # 15 s, and 141.1 GB / ranks at 1 GB/s


def test_a_kind_of_gpu_without_room_is_said(tmp_path):
    run_file = write_run(tmp_path, big_model(tmp_path), ONE_LINE)
    done = hpckv("plan", run_file)
    assert done.returncode == 78, done.stderr
    assert "H100 80GB: 169 GB for the model do not fit 80 GB; raise parallel.tp or parallel.pp" in done.stdout
    assert "prompt tokens      3" in done.stdout  # the input is read all the same
    split = hpckv("plan", run_file, "--set", "parallel.tp=4")
    assert split.returncode == 0, split.stderr
    assert "A100 80GB   bfloat16" in split.stdout


def test_a_gpu_without_a_data_sheet_is_planned_by_the_sites_rates(run_file, tmp_path):
    rates = [{"gpu": "L40S", "prefill_tokens_per_s": 100, "decode_tokens_per_s": 10}]
    (tmp_path / "site.yaml").write_text(json.dumps({"rates": rates}))
    (found,) = json.loads(hpckv("plan", run_file, "--gpu", "NVIDIA L40S", "--json").stdout)["gpus"]
    assert (found["rates"], found["dtype"]) == ("site", "float32")  # the checkpoint's


def test_with_nothing_left_some_time_is_asked_for(tmp_path, checkpoint):
    run_file = write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "output.jsonl").write_text('{"custom_id": "q0"}\n')
    found = json.loads(hpckv("plan", run_file, "--gpu", "H100", "--json").stdout)["gpus"][0]
    assert found["time"] == "00:05:00"  # to Slurm 0 is for ever


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--gpu", "T4"], 64, "--gpu T4: no rates and no data sheet of it"),
        (["--input", "no.jsonl"], 66, "no.jsonl: No such file or directory"),
        (["--set", "slurm.max_points=-1"], 64, "slurm.max_points: -1 is not above 0"),
    ],
)
def test_what_is_wrong_is_one_line(run_file, flags, code, said):
    done = hpckv("plan", run_file, *flags)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
