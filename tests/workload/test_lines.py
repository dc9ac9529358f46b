"""OpenAI Batch lines: what is read, and one clear reason with a line number for everything that is wrong."""

import json

import pytest

from hpckv.engine.request import SamplingParams
from hpckv.errors import InputError, MissingInputError
from hpckv.workload.lines import read_batch


def line(custom_id="a", url="/v1/completions", **body):
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {"prompt": "hi", **body}})


def read(tmp_path, *lines, defaults=SamplingParams()):  # noqa: B008 - frozen
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(part if isinstance(part, bytes) else part.encode() for part in lines) + b"\n")
    return read_batch(path, defaults)


def test_both_endpoints_and_token_ids_are_read(tmp_path):
    chat = json.dumps(
        {"custom_id": "c", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "x"}]}}
    )
    batch = read(tmp_path, line("t"), line("i", prompt=[5, 6]), chat)
    assert [(n.custom_id, n.text, n.token_ids, n.messages) for n in batch.lines] == [
        ("t", "hi", None, None),
        ("i", None, [5, 6], None),
        ("c", None, None, [{"role": "user", "content": "x"}]),
    ]
    assert batch.bad == []


def test_a_body_overrides_the_run_files_defaults(tmp_path):
    defaults = SamplingParams(max_tokens=7, temperature=0.5, stop=["x"])
    own = read(
        tmp_path, line(temperature=0, stop="end", n=2, logprobs=3, seed=9, top_k=4, top_p=0.5), defaults=defaults
    )
    assert own.lines[0].params == SamplingParams(
        max_tokens=7, temperature=0.0, stop=["end"], n=2, logprobs=3, seed=9, top_k=4, top_p=0.5
    )
    chat = json.dumps({
        "custom_id": "c", "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2},
    })  # fmt: skip
    params = read(tmp_path, chat, defaults=defaults).lines[0].params
    assert (params.max_tokens, params.logprobs, params.stop) == (3, 2, ["x"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"custom_id": "a", "body"', "not valid JSON"),
        (b'{"custom_id": "\xff"}', "not UTF-8"),
        (line("b", prompt="cut \ud83d"), "surrogate"),
        ('{"custom_id": "b", "body": {"prompt": [' + "1" * 5000 + "]}}", "too long"),
        ("[" * 100_000, "nested too deep"),
        ("[1]", "expected a JSON object"),
        ('{"body": {"prompt": "x"}}', "custom_id is missing"),
        ('{"custom_id": "b"}', "body is missing"),
        (line("b", url="/v1/embeddings"), "neither /v1/chat/completions nor"),
        (line("b", prompt=""), "prompt is missing"),
        (line("b", prompt=[1.5]), "prompt is missing"),
        (line("b", stream=True), "stream"),
        (line("b", temperature=-1), "temperature: -1.0 is not between 0 and 100"),
        (line("b", max_tokens=0), "max_tokens: 0 is not at least 1"),
        (line("b", n="2"), "body: n: Expected `int`, got `str`"),
        (line("ok"), "custom_id 'ok' is already used in line 1"),
        ('{"custom_id": "b", "url": "/v1/chat/completions", "body": {"messages": []}}', "messages is missing"),
        ('{"custom_id": "b", "body": {"messages": [{"role": "user", "content": [1]}]}}', "content must be text"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_reason(tmp_path, text, reason):
    batch = read(tmp_path, line("ok"), text)
    assert [n.custom_id for n in batch.lines] == ["ok"]
    (bad,) = batch.bad
    assert bad.number == 2
    assert reason in bad.reason


def test_unknown_body_keys_are_reported_once_with_their_first_line(tmp_path):
    batch = read(tmp_path, line("a"), line("b", presence_penalty=1), line("c", presence_penalty=1, best_of=2))
    assert batch.unknown_keys == {"presence_penalty": 2, "best_of": 3}


def test_empty_and_missing_files_are_errors(tmp_path):
    with pytest.raises(InputError, match="empty"):
        read(tmp_path, "", "  ")
    with pytest.raises(MissingInputError, match="No such file"):
        read_batch(tmp_path / "nowhere.jsonl", SamplingParams())
