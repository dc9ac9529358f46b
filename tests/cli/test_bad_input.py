"""Everything a user can get wrong: one clear line, the promised exit code, no traceback, nothing lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.runs import chat_lines, hpckv, texts, write_run


def fails(done, code: int, *words: str) -> str:
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("hpckv: ")
    for word in words:
        assert word in last
    return last


@pytest.fixture
def model(checkpoint) -> Path:
    return checkpoint("llama", tokenizer=True)


def test_torn_json(model, tmp_path):
    data = b'{"custom_id": "a", "body": {"prompt": "x"}}\n{"custom_id": "b", "bo'
    fails(hpckv("run", write_run(tmp_path, model, data)), 65, "in.jsonl:2:", "not valid JSON")


def test_duplicate_id(model, tmp_path):
    fails(
        hpckv("run", write_run(tmp_path, model, [*chat_lines(2), chat_lines(1)[0]])),
        65,
        "in.jsonl:3:",
        "'q0' is already used in line 1",
    )


def test_bad_utf8(model, tmp_path):
    fails(hpckv("run", write_run(tmp_path, model, b'{"custom_id": "\xff"}\n')), 65, "in.jsonl:1:", "not UTF-8")


def test_empty_file(model, tmp_path):
    fails(hpckv("run", write_run(tmp_path, model, b"")), 65, "empty")


def test_missing_input(model, tmp_path):
    fails(hpckv("run", write_run(tmp_path, model, []), "--input", tmp_path / "nowhere.jsonl"), 66, "nowhere.jsonl")


def test_prompt_too_long_is_refused_before_anything_runs_or_skipped_on_request(model, tmp_path):
    long = {"custom_id": "long", "url": "/v1/completions", "body": {"prompt": "x" * 600}}
    run = write_run(tmp_path, model, [*chat_lines(2), long])
    fails(hpckv("run", run), 65, "in.jsonl:3:", "600 tokens", "context is 512")
    assert not (tmp_path / "out" / "output.jsonl").read_bytes()
    done = hpckv("run", run, "--skip-bad-lines")
    assert done.returncode == 3
    assert sorted(texts(tmp_path)) == ["q0", "q1"]
    error = json.loads((tmp_path / "out" / "errors.jsonl").read_text())
    assert (error["custom_id"], error["error"]["line"]) == ("long", 3)
    assert hpckv("run", run, "--skip-bad-lines", "--allow-errors").returncode == 0


def test_unknown_key_in_the_run_file(model, tmp_path):
    fails(
        hpckv("run", write_run(tmp_path, model, chat_lines(1), engine={"max_request": 3})),
        64,
        "engine.max_request",
        "did you mean 'max_requests'?",
    )
    fails(
        hpckv("run", write_run(tmp_path, model, chat_lines(1)), "--set", "cache.block_token=4"),
        64,
        "did you mean 'block_tokens'?",
    )


def test_unknown_flag_and_missing_run_file(tmp_path):
    fails(hpckv("run", "x.yaml", "--outputt", "y"), 64, "--outputt", "hpckv.cli.main run --help")
    fails(hpckv("run"), 64, "RUN.yaml")
    fails(hpckv("nonsense"), 64, "nonsense")
    fails(hpckv("submit", "x.yaml", "-N", "many"), 64, "--nodes")
    assert hpckv("store").stderr.startswith("Usage:")
    fails(hpckv("run", tmp_path / "nowhere.yaml"), 66, "nowhere.yaml")
    fails(hpckv("run", tmp_path / "no  where.yaml"), 66, f"{tmp_path}/no  where.yaml")  # as it is called


def test_missing_tokenizer(checkpoint, tmp_path):
    fails(hpckv("run", write_run(tmp_path, checkpoint("llama"), chat_lines(1))), 69, "tokenizer.json", "missing")


def test_missing_model_folder(tmp_path):
    fails(hpckv("run", write_run(tmp_path, tmp_path / "nomodel", chat_lines(1))), 69, "nomodel")


@pytest.mark.parametrize("keep", [5, 4000, 100_000])
def test_truncated_safetensors(model, tmp_path, keep):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    file = copy / "model.safetensors"
    os.truncate(file, keep)
    fails(hpckv("run", write_run(tmp_path, copy, chat_lines(1))), 69, "model.safetensors", "truncated")


def test_missing_and_left_over_tensors_are_named(model, tmp_path):
    from safetensors.torch import load_file, save_file

    for name, change in {
        "missing": lambda t: t.pop("model.norm.weight"),
        "left": lambda t: t.update(extra=t["model.norm.weight"].clone()),
    }.items():
        copy = tmp_path / name
        shutil.copytree(model, copy)
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors")
        word = (
            "model.norm.weight is missing"
            if name == "missing"
            else "left-over tensors that this architecture does not use: extra"
        )
        fails(hpckv("run", write_run(tmp_path, copy, chat_lines(1))), 69, word)


def test_unknown_architecture_is_refused_with_the_known_ones(model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["FalconForCausalLM"]}))
    fails(
        hpckv("run", write_run(tmp_path, copy, chat_lines(1))),
        69,
        "FalconForCausalLM is not known",
        "LlamaForCausalLM",
        "Gemma2ForCausalLM",
    )


def test_a_model_that_does_not_fit_is_refused_before_loading(model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4_000_000}))
    fails(hpckv("run", write_run(tmp_path, copy, chat_lines(1))), 78, "memory")
    fails(
        hpckv("run", write_run(tmp_path, model, chat_lines(1), cache={"device_memory": "900TiB"})),
        78,
        "cache.device_memory",
    )
    none = {"block_tokens": 16, "device_memory": "200KiB"}
    fails(hpckv("run", write_run(tmp_path, model, chat_lines(1), cache=none)), 78, "cache.device_memory", "pages")
    small = {"block_tokens": 16, "device_memory": "300KiB"}
    fails(hpckv("run", write_run(tmp_path, model, chat_lines(1), cache=small)), 65, "cache.device_memory")


def test_an_unwritable_output_directory(model, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    fails(hpckv("run", write_run(tmp_path, model, chat_lines(1)), "--output", blocked / "out"), 73, "Not a directory")


def test_a_store_that_is_no_store(model, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("")
    fails(
        hpckv("run", write_run(tmp_path, model, chat_lines(1), store={"shared": str(home)})),
        69,
        "neither empty nor an hpckv store",
    )


def test_what_is_not_in_this_version_is_said(model, tmp_path):
    fails(hpckv("run", write_run(tmp_path, model, chat_lines(1)), "--set", "model.quantization=fp8"), 78, "fp8")
    fails(hpckv("run", write_run(tmp_path, model, chat_lines(1)), "--set", "cache.kv_dtype=fp8"), 78, "kv_dtype")


def test_too_few_processes_are_said_with_the_command_that_starts_enough(model, tmp_path):
    run = write_run(tmp_path, model, chat_lines(1))
    fails(
        hpckv("run", run, "--set", "parallel.pp=2"),
        64,
        "needs 2 processes, 1 were started; start the same command with srun",
    )


def test_a_full_disk_during_the_run_keeps_every_answer_and_goes_on_later(model, tmp_path):
    """RLIMIT_FSIZE stands in for the full disk: the same write fails in the same place, and no root is needed."""
    run = write_run(tmp_path, model, chat_lines(40), engine={"max_requests": 4})
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "sys.argv = ['hpckv', 'run', sys.argv[1]]; from hpckv.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=300)
    fails(done, 73, "output.jsonl", "answers so far are safe")
    some = texts(tmp_path)
    assert 0 < len(some) < 40
    assert hpckv("run", run).returncode == 0
    assert len(texts(tmp_path)) == 40
    assert texts(tmp_path).items() >= some.items()


def test_unknown_body_keys_are_warned_of_once(model, tmp_path):
    lines = chat_lines(3)
    for line in lines:
        line["body"]["presence_penalty"] = 1
    done = hpckv("run", write_run(tmp_path, model, lines))
    assert done.returncode == 0
    assert done.stderr.count("presence_penalty") == 1


def test_an_overflow_is_an_error_and_never_an_answer(model, tmp_path):
    """float16 ends at 65,504: here one layer passes it for every prompt, so that no request can be answered."""
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 3e5
    save_file(tensors, copy / "model.safetensors")
    lines = chat_lines(3)
    lines[0]["body"]["n"] = 3
    run = write_run(tmp_path, copy, lines)
    done = hpckv("run", run, "--set", "model.dtype=float16")
    assert done.returncode == 3, done.stderr
    assert texts(tmp_path) == {}
    errors = [json.loads(raw) for raw in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert sorted(e["custom_id"] for e in errors) == ["q0", "q1", "q2"]
    assert "not finite" in errors[0]["error"]["message"]
    assert hpckv("run", run, "--set", "model.dtype=float32").returncode == 0
    assert len(texts(tmp_path)) == 3


@pytest.mark.root
@pytest.mark.parametrize("more", [[], ["--join"]])
def test_a_filesystem_without_room_for_another_file(tmp_path, model, more):
    out = tmp_path / "out"
    out.mkdir()
    run_file = write_run(tmp_path, model, chat_lines(2))
    for count in (4, 6, 7, 9, 12, 16, 32):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=1m,nr_inodes={count}", "small", out], check=True)
        try:
            done = hpckv("run", run_file, *more)
            if done.returncode == 0:
                break
            fails(done, 73, str(out), "No space left on device")
        finally:
            subprocess.run(["umount", out], check=True)
    else:
        pytest.fail("no number of files is enough")


@pytest.mark.root
@pytest.mark.parametrize(
    "verb",
    [
        *("run FILE", "plan FILE", "submit --dry-run FILE", "lint FILE", "bench load FILE", "status DIR", "cancel DIR"),
        *(
            "model info DIR",
            "acct --run DIR",
            "acct --store DIR",
            "store ls DIR",
            "store init DIR/new",
            "run DIR/x.yaml",
        ),
    ],
)
def test_what_may_not_be_read_is_named(tmp_path, verb):
    file, folder = tmp_path / "private.yaml", tmp_path / "private"
    file.touch(0o600)
    folder.mkdir(0o700)
    for path in (file, folder):
        os.chown(path, 65534, 65534)
    words = verb.replace("FILE", str(file)).replace("DIR", str(folder)).split()
    # As for anybody but the owner, and root without its right to read all.
    as_others = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    command = [*as_others, sys.executable, "-m", "hpckv.cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    fails(done, 77, str(tmp_path / "private"), "permission denied")
