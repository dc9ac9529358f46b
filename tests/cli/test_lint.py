"""`hpckv lint` as a user runs it: figures, copies, exit codes."""

import json
import re
import subprocess
import sys

import pytest

from tests.cli.runs import chat_lines, hpckv, write_run
from tests.docs.test_documents import TOP

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(TOP)}


def dated_lines(count=8):
    lines = chat_lines(count, heads=1)
    for n, line in enumerate(lines):
        system = line["body"]["messages"][0]
        system["content"] = f"Now: 2026-11-{n + 1:02d}.\n" + system["content"].replace(". ", ".  " if n % 2 else ". ")
    return lines


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_documents_example_prints_what_it_says(tmp_path):
    text = (TOP / "docs" / "lint.md").read_text()
    program = re.search(r"END'\n(.*?)END\n", text, re.DOTALL)[1]
    printed = re.search(r"prints\n\n```\n(.*?)```", text, re.DOTALL)[1]
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    (tmp_path / "careless.jsonl").write_text(made.stdout)
    done = hpckv("lint", "careless.jsonl", "--fix", "fixed.jsonl", cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 3, done.stderr
    assert [line.rstrip() for line in done.stdout.splitlines()] == printed.splitlines()


def test_a_clean_file_ends_with_0():
    done = hpckv("lint", TOP / "examples" / "catalogue.jsonl", "--model", TOP / "examples" / "recall-1m")
    assert done.returncode == 0, done.stderr
    assert "nothing found" in done.stdout
    assert "252,960" in done.stdout
    assert "estimated" not in done.stdout


def test_json_has_every_figure_and_points(tmp_path):
    path = write(tmp_path / "in.jsonl", dated_lines())
    done = hpckv("lint", path, "--json", "--block-tokens", 4, "--points-per-million-tokens", 1000)
    assert done.returncode == 3, done.stderr
    record = json.loads(done.stdout)
    assert record["requests"] == 8
    assert record["tokens_are_estimated"] is True
    assert record["block_tokens"] == 4
    finding = record["findings"][0]
    assert finding["kind"] == "changing value"
    assert finding["points"] == finding["tokens"] / 1000
    assert finding["examples"][0] == {"number": 1, "message": 1, "character": 6, "text": "'2026-11-01.'"}
    saved = sum(finding["tokens_in_turn"] for finding in record["findings"])
    assert record["distinct_prefix_tokens"] - record["distinct_prefix_tokens_after_all_repairs"] == saved


def test_a_run_file_gives_tokenizer_and_block_size(tmp_path, checkpoint):
    run_file = write_run(tmp_path, checkpoint("llama", tokenizer=True), dated_lines())
    record = json.loads(hpckv("lint", tmp_path / "in.jsonl", "--run", run_file, "--json").stdout)
    assert record["tokens_are_estimated"] is False
    assert record["block_tokens"] == 16
    estimated = json.loads(hpckv("lint", tmp_path / "in.jsonl", "--json").stdout)
    assert record["prompt_tokens"] > 3 * estimated["prompt_tokens"]  # its tokenizer makes a token of each byte


def test_a_copy_has_the_repairs_and_everything_else_as_it_was(tmp_path):
    lines = dated_lines()
    lines[0]["body"]["metadata"] = {"kept": "caf\u00e9"}
    path = write(tmp_path / "in.jsonl", lines)
    done = hpckv("lint", path, "--fix", tmp_path / "out.jsonl", "--block-tokens", 4)
    assert done.returncode == 3, done.stderr
    assert "+++ line 2 (q1), fixed" in done.stdout
    assert "models may answer them differently" in done.stdout
    assert "not repaired, by hand: changing value" in done.stdout
    raw, fixed = path.read_bytes().splitlines(), (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert raw[0::2] == fixed[0::2]
    for before, after in zip(lines[1::2], map(json.loads, fixed[1::2]), strict=True):
        assert "  " not in after["body"]["messages"][0]["content"]
        before["body"]["messages"][0] = after["body"]["messages"][0]
        assert after == before
    again = hpckv("lint", tmp_path / "out.jsonl", "--fix", tmp_path / "third.jsonl", "--block-tokens", 4)
    assert "0 of 8 requests differ" in again.stdout
    assert (tmp_path / "third.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_copy_has_the_permissions_of_the_input(tmp_path, mode):
    path = write(tmp_path / "in.jsonl", dated_lines())
    path.chmod(mode)
    done = hpckv("lint", path, "--fix", tmp_path / "out.jsonl", "--block-tokens", 4)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "out.jsonl").stat().st_mode & 0o777 == mode


def test_nothing_is_written_over(tmp_path):
    path = write(tmp_path / "in.jsonl", dated_lines())
    before = path.read_bytes()
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    for target, reason in ((path, "is the input"), (there, "exists"), (tmp_path / "no" / "x.jsonl", "No such file")):
        done = hpckv("lint", path, "--fix", target)
        assert done.returncode == 73
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1
    assert (path.read_bytes(), there.read_text()) == (before, "mine")


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["bad.jsonl"], 65, "bad.jsonl:2: not valid JSON"),
        (["empty.jsonl"], 65, "the file is empty"),
        (["nowhere.jsonl"], 66, "No such file"),
        (["good.jsonl", "--block-tokens", "0"], 64, "block_tokens: 0 is not between"),
        (["good.jsonl", "--model", "m", "--run", "r"], 64, "give one of them"),
        (["good.jsonl", "--points-per-million-tokens", "-1"], 64, "is no price"),
        (["good.jsonl", "--model", "nowhere"], 69, "tokenizer.json: missing"),
        (["good.jsonl", "--run", "nowhere.yaml"], 66, "no such file"),
        (["/dev/null", "--fix", "x.jsonl"], 64, "no regular file"),
    ],
)
def test_wrong_input_is_one_clear_line(tmp_path, arguments, code, reason):
    write(tmp_path / "good.jsonl", dated_lines(2))
    (tmp_path / "bad.jsonl").write_text(json.dumps(dated_lines(1)[0]) + '\n{"custom_id": \n')
    (tmp_path / "empty.jsonl").write_text("\n")
    done = hpckv("lint", *arguments, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == code
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
