"""`hpckv store` from outside: a store's life, and every wrong call one line."""

import json
import os

import pytest

from tests.cli.runs import chat_lines, hpckv, write_run


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint("llama", tokenizer=True)


def done(*arguments, code=0):
    result = hpckv("store", *arguments)
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    return result


def test_a_stores_life(model, tmp_path):
    store = tmp_path / "kv"
    assert "private to you" in done("init", store, "--quota", "1GiB", "--files", 500).stdout
    run = write_run(tmp_path, model, chat_lines(12))
    warmed = json.loads(done("warm", store, "--run", run, "--json").stdout)
    assert warmed["prefixes"] == 12
    assert 0 < warmed["computed_tokens"] < warmed["prompt_tokens"]
    again = json.loads(done("warm", store, "--run", run, "--json").stdout)
    assert again["computed_tokens"] < warmed["computed_tokens"] / 2

    info = json.loads(done("info", store, "--json").stdout)
    assert info["quota"]["bytes"] == "1GiB"
    assert info["used"]["users"] == [os.getuid()]
    (row,) = json.loads(done("ls", store, "--json").stdout)
    assert row["segments"] == info["used"]["segments"] == 1
    assert row["model"].startswith("Llama ")
    (user,) = json.loads(done("du", store, "--json").stdout)
    assert user["bytes"] == info["used"]["bytes"]

    assert json.loads(done("check", store, "--json").stdout)["findings"] == []
    assert "0 segments became 0" in done("compact", store).stdout
    assert json.loads(done("gc", store, "--json").stdout) == {"files": 0, "bytes": 0}

    (segment,) = store.glob("u/*/seg/*/*.h5")
    segment.chmod(0o600)
    segment.write_bytes(segment.read_bytes()[:-700])
    segment.chmod(0o440)
    broken = done("check", store, code=3)
    assert str(segment) in broken.stdout.replace("\n", "")
    done("check", store, "--repair", code=3)
    assert not segment.exists()
    done("check", store)

    assert json.loads(done("purge", store, "--json").stdout)["deleted"] is False
    assert json.loads(done("du", store, "--json").stdout) != []
    done("purge", store, "--yes")
    assert list(store.glob("u/*/seg/*/*")) == []
    assert "key epoch 1" in done("rotate", store).stdout


def test_tables_fit_a_terminal_and_name_everything(model, tmp_path):
    done("warm", tmp_path / "kv", "--run", write_run(tmp_path, model, chat_lines(3)))
    for verb in ("info", "ls", "du", "check"):
        text = done(verb, tmp_path / "kv").stdout
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["info", "{tmp}/nothing"], 69, "store init"),
        (["check", "{tmp}/nothing"], 69, "STORE.json"),
        (["init", "{tmp}/kv", "--quota", "much"], 64, "not a size"),
        (["init", "{tmp}/kv", "--group", "no-such-group"], 64, "no such group"),
        (["init", "{tmp}/kv", "--trust", "nobody"], 64, "project or self"),
        (["init", "{tmp}/kv", "--files", "0"], 64, "files"),
        (["init", "/proc/kv"], 69, "/proc/kv"),
        (["warm", "{tmp}/kv", "--run", "{tmp}/none.yaml"], 66, "none.yaml"),
        (["compact", "{tmp}/made", "--segment-size", "x"], 64, "not a size"),
        (["purge", "{tmp}/made", "--namespace", "zz"], 64, "zz"),
        (["init", "{tmp}/made"], 69, "already"),
        (["frobnicate"], 64, "frobnicate"),
    ],
)
def test_a_wrong_call_is_one_line_and_a_code(tmp_path, arguments, code, words):
    done("init", tmp_path / "made")
    result = done(*[a.format(tmp=tmp_path) for a in arguments], code=code)
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith(("hpckv: ", "Usage"))


def test_policy_verbs_say_what_they_did_in_one_line(tmp_path):
    store = tmp_path / "kv"
    done("init", store, "--bridging", "off")
    assert json.loads(done("info", store, "--json").stdout)["bridging"] == "off"
    assert "not trusted" in done("distrust", store, "4711").stdout
    assert json.loads(done("info", store, "--json").stdout)["distrusted"] == [4711]
    assert "nobody" in done("distrust", store, "4711", "--undo").stdout
    assert "no such user" in done("distrust", store, "no-such-user", code=64).stderr
    assert "no such group" in done("share", store, "--with", "no-such-group", code=64).stderr
    done("init", tmp_path / "other", "--bridging", "perhaps", code=64)


def test_bench_identity_is_as_it_must_be():
    result = hpckv("bench", "identity", "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert all(row["expected"] == row["found"] for row in rows)
