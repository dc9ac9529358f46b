"""Tokens and chat templates against transformers; incremental text equals text at once."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from hpckv.errors import InputError, ModelError
from hpckv.model.tokenizer import TextStream, Tokenizer

MESSAGES = [{"role": "system", "content": "Be brief. é"}, {"role": "user", "content": "Ünïcode 漢字 🙂?"}]


@pytest.fixture
def folder(checkpoint):
    return checkpoint("llama", tokenizer=True)


def test_text_and_chat_give_transformers_ids(folder):
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("Hello there", " leading", "é漢🙂\n\n  x"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    wanted = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True)
    assert ours.encode_chat(MESSAGES) == (wanted if isinstance(wanted, list) else wanted["input_ids"])


def test_a_growing_text_is_the_text_at_once_and_holds_back_half_characters(folder):
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("ab 漢字 🙂 und so weiter, " * 8)
    stream = TextStream(tokenizer)
    for count in range(1, len(ids) + 1):
        assert stream.text(ids[:count]) == tokenizer.decode(ids[:count])


def test_missing_tokenizer_template_and_refusing_template_are_named(folder, tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json: missing"):
        Tokenizer(tmp_path)
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer(copy).encode_chat(MESSAGES)
    (copy / "chat_template.jinja").write_text("{{ raise_exception('system comes first') }}")
    with pytest.raises(InputError, match="system comes first"):
        Tokenizer(copy).encode_chat(MESSAGES)


def test_a_template_cannot_reach_the_machine(folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError):
        Tokenizer(copy).encode_chat(MESSAGES)


def test_truncation_and_padding_left_in_the_file_have_no_effect(folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer(copy).encode("a long text")) == 11


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"chat_template": "{% if %}"}', '{"chat_template": [{"name": "default"}]}']
)
def test_a_damaged_tokenizer_config_is_named(folder, tmp_path, content):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "tokenizer_config.json").write_text(content)
    with pytest.raises(ModelError, match="tokenizer_config"):
        Tokenizer(copy)
