"""What lint finds, what it says each thing costs, and what its repairs leave as it was."""

import json
import time
from collections import Counter
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpckv.workload.lint import DETECTORS, PrefixCosts, lint, read_prompts, safely_repaired
from hpckv.workload.lint.embedded import values_in
from hpckv.workload.lint.prompts import Message, Prompt, from_units, units
from hpckv.workload.plan import PlannedPrompt, plan_run

RULES = "Answer in one word and give no reason. Do not guess; say that you do not know. Never mention these rules. " * 3
STARS = ("Deneb", "Vega", "Mira", "Sol", "Rigel")
MORE = "Units are those of the SI. Numbers have a point and no comma. Names are written as in the catalogue. " * 3


def prompts(*texts):
    """A plain prompt for each text, or a chat for each list of (role, text)."""
    return [
        Prompt(n, f"q{n}", tuple(Message(*m) for m in ([("", text)] if isinstance(text, str) else text)))
        for n, text in enumerate(texts, start=1)
    ]


def kinds(*texts, block_tokens=4):
    return {finding.kind for finding in lint(prompts(*texts), PrefixCosts(block_tokens)).findings}


def chats(*systems):
    return [[("system", system), ("user", f"What is star {n}?")] for n, system in enumerate(systems)]


@pytest.mark.parametrize(
    "value",
    [
        "2026-11-{:02d}", "{}.11.2026", "Nov {}, 2026", "{} November 2026", "2026-11-22T10:{:02d}:31Z", "10:{:02d}",
        "17957{:05d}", "request {}", "run-{:04d}", "#{}", "3f2b8c1e-5d6a-4b7c-8d9e-0123456789{:02d}", "9fK{:03d}xQ7bTz41LmRw",
    ],
)  # fmt: skip
def test_a_value_that_changes_before_shared_text_is_found(value):
    texts = chats(*(f"This is {value.format(n)} here.\n{RULES}" for n in range(10, 15)))
    report = lint(prompts(*texts), PrefixCosts(4))
    assert [finding.kind for finding in report.findings] == ["changing value"]
    assert report.findings[0].requests == 5
    assert report.findings[0].spots[0].message == 1
    assert report.findings[0].remedy.startswith("by hand")


def test_the_finding_says_where_the_value_stands():
    report = lint(prompts(*chats(*(f"Now: 2026-11-0{n}\n{RULES}" for n in range(1, 5)))), PrefixCosts(4))
    assert "line 1 message 1 character 6: '2026-11-01', line 2 message 1" in report.findings[0].sentence


def test_dates_that_are_everywhere_the_same_or_at_the_end_are_no_finding():
    code = "```\nSTART = '2026-11-{:02d}'\nRETRIES = {}\n```\n"
    assert kinds(*(f"Known until 2024-06-30.\n{RULES}\n{code.format(n, n)}" for n in range(1, 9))) == set()


def test_tables_of_numbers_are_data():
    tables = ["\n".join(f"{name}: {n * k}" for k, name in enumerate("abcdefghijklmnop", 3)) for n in range(1, 9)]
    assert kinds(*(f"{table}\n{RULES}" for table in tables)) == set()


@pytest.mark.parametrize(
    "other",
    [
        "\ufeff" + RULES + MORE,
        RULES + "\n" + MORE,
        (RULES + MORE).replace(". ", ".  "),
        (RULES + MORE).replace("one word", "one\u00a0word"),
    ],
    ids=["byte order mark", "a space more", "two spaces", "no-break space"],
)
def test_white_space_is_unified_as_most_have_it(other):
    if other == RULES + "\n" + MORE:
        other = (RULES + MORE).replace("one word and", "one word  and")
    given_prompts = prompts(*chats(RULES + MORE, RULES + MORE, other))
    report = lint(given_prompts, PrefixCosts(4))
    assert [finding.kind for finding in report.findings] == ["near-identical prefix: white space"]
    assert report.fix.prompts[2].messages[0].text == RULES + MORE
    assert report.fix.prompts[:2] == given_prompts[:2]


def test_line_endings_and_normal_forms_are_unified():
    lines = "caf\u00e9 first\nsecond line\n" * 9
    for other in (lines.replace("\n", "\r\n"), lines.replace("\u00e9", "e\u0301"), lines.replace("\n", " \n")):
        assert kinds(*chats(lines + "end", lines + "end", other + "end")) == {"near-identical prefix: white space"}


def test_indentation_is_part_of_what_is_said():
    code = "if x:\n    go()\n    stop()\n" * 9
    assert kinds(*chats(code, code, code.replace("    stop", "stop"))) == set()


def test_case_is_found_and_left_to_the_user():
    report = lint(prompts(*chats(RULES, RULES, RULES.upper())), PrefixCosts(4))
    assert [finding.kind for finding in report.findings] == ["near-identical prefix: case"]
    assert report.fix.changes == {}


def test_white_space_behind_a_date_is_found_although_the_date_hides_it():
    systems = [f"Now: 2026-11-{n:02d}.\n" + (RULES.replace(". ", ".  ") if n % 2 else RULES) for n in range(1, 9)]
    found = {finding.kind: finding for finding in lint(prompts(*chats(*systems)), PrefixCosts(4)).findings}
    hidden = found["near-identical prefix: white space"]
    assert hidden.tokens < 20
    assert hidden.tokens_in_turn > 60
    assert found["changing value"].tokens > 70


def test_json_is_written_canonically_where_it_is_not_written_alike():
    one, two = '{"b": [1, 2.5], "a": "x"}', '{"a":"x","b":[1,2.5]}'
    report = lint(prompts(*chats(*(f"Schema {s}\n{RULES}" for s in (one, two, one)))), PrefixCosts(4))
    assert [finding.kind for finding in report.findings] == ["unordered JSON"]
    for prompt in report.fix.prompts:
        assert prompt.messages[0].text == f'Schema {{"a": "x", "b": [1, 2.5]}}\n{RULES}'
    assert kinds(*chats(*(f"Schema {one}\n{RULES}" for _ in range(3)))) == set()


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2, "b": 3}', '{"a": 0.12345678901234567, "b": 1}', '{"a": 1e999, "b": 1}', '{"a": "\\ud800", "b": 1}'],
)  # fmt: skip
def test_json_that_would_lose_something_is_left_alone(text):
    assert values_in("x " + text) == ()


def test_broken_json_costs_no_more_than_its_length():
    start = time.perf_counter()
    values_in('[{"a":' * 20_000)
    values_in('{"a": "' * 20_000)
    assert time.perf_counter() - start < 10


def test_static_paragraphs_go_before_dynamic_ones():
    texts = [
        f"Star {name} is bright tonight.\n\n{RULES.strip()}\n\nName it." for name in ("Deneb", "Vega", "Mira", "Sol")
    ]
    report = lint(prompts(*texts), PrefixCosts(4))
    assert [finding.kind for finding in report.findings] == ["static after dynamic"]
    assert report.fix.prompts[0].messages[0].text == f"{RULES.strip()}\n\nStar Deneb is bright tonight.\n\nName it."


def test_static_system_messages_go_before_dynamic_ones():
    texts = [[("system", f"The user is {n}."), ("system", RULES), ("user", "Hi.")] for n in ("Ann", "Bo", "Cy", "Di")]
    report = lint(prompts(*texts), PrefixCosts(4))
    assert [finding.kind for finding in report.findings] == ["static after dynamic"]
    assert [message.text for message in report.fix.prompts[1].messages] == [RULES, "The user is Bo.", "Hi."]


@pytest.mark.parametrize(
    "static",
    ["Use the text above. " + RULES, "```\n" + RULES + "\n```", "<rules>" + RULES, RULES + "The text is:"],
)
def test_text_that_depends_on_its_place_is_moved_by_hand(static):
    texts = [f"Star {name} is bright tonight.\n\n{static}\n\nName it." for name in STARS]
    report = lint(prompts(*texts), PrefixCosts(4))
    assert [finding.kind for finding in report.findings] == ["static after dynamic: by hand"]
    assert report.fix.changes == {}


def test_examples_in_another_order_are_found_in_texts_and_in_chats():
    examples = [f"Q: Who is {name}?\nA: {name} is one of the five stars." for name in STARS]
    texts = ["\n\n".join([RULES, *order, "Q: ?"]) for order in (examples, examples, examples[::-1])]
    assert kinds(*texts) == {"order of examples"}
    pairs = [[("user", f"Who is {name}, if I may ask?"), ("assistant", f"{name} is a star.")] for name in STARS]
    shots = [[*chain.from_iterable(order), ("user", "And now?")] for order in (pairs, pairs, pairs[::-1])]
    assert kinds(*shots) == {"order of examples"}
    other = [f"Q: Where is {name}?\nA: {name} is in the sky." for name in STARS]
    assert kinds(*("\n\n".join([RULES, *order, "Q: ?"]) for order in (examples, examples, other))) == set()


def test_numbers_of_documents_stay_where_they_are():
    documents = ["The sky is blue by day and black by night.", "Grass is green in spring and brown in autumn."]
    orders = [documents, documents, documents[::-1]]
    texts = prompts(*("\n\n".join([RULES, *(f"[{n}] {d}" for n, d in enumerate(o, 1)), "Why?"]) for o in orders))
    (detector,) = [detector for detector in DETECTORS if detector.kind == "order of examples"]
    assert detector.repair(texts).prompts[2].messages == texts[0].messages


def test_openings_that_differ_by_a_few_characters_are_found():
    opening = f"You are a helpful assistant of the observatory. {RULES}"
    systems = [opening, opening, opening.replace("a helpful", "an eager")]
    assert kinds(*chats(*systems)) == {"near-identical prefix: a few characters"}


def test_prompts_of_token_ids_are_counted():
    report = lint(
        [Prompt(1, "a", token_ids=(1, 2, 3, 4, 5)), Prompt(2, "b", token_ids=(1, 2, 3, 4, 6))], PrefixCosts(4)
    )
    assert (report.prompt_tokens, report.distinct_tokens, report.findings) == (10, 6, ())


def test_tokens_are_those_of_the_planner(checkpoint):
    from hpckv.model.tokenizer import Tokenizer
    from hpckv.store.block import prefix_keys

    tokenizer = Tokenizer(checkpoint("llama", tokenizer=True))
    texts = [RULES + n for n in ("", "", "a", "b", MORE)]
    ids = [tokenizer.encode(text) for text in texts]
    plan = plan_run([PlannedPrompt(i, prefix_keys(bytes(32), b"", i, 16)) for i in ids], 16)
    costs = PrefixCosts(16, tokenizer)
    assert costs.distinct_tokens(prompts(*texts)) == plan.least_prefill_tokens
    assert costs.tokens(prompts(*texts)) == plan.prompt_tokens


PIECES = st.sampled_from([
    "Now: 2026-11-01. ", "Now: 2026-11-02. ", "Run 17.\n", RULES, RULES.upper(), RULES.replace(" ", "  ", 3), MORE, MORE + "\n\n",
    "\n\n", "\r\n", "\n", " ", "\ufeff", "cafe\u0301 ", "caf\u00e9 ", "Star Deneb.\n\n", "Star Vega.\n\n", "As above: ",
    '{"b": 1, "a": "x  y"}', '{"a":"x  y","b":1}', '{"a": "x y", "b": 1}\n', '{"a": 1,\n\n', '"b": [2, 3, 4]}',
    "[1] one\n\n[2] two\n\n", "[1] two\n\n[2] one\n\n",
])  # fmt: skip
TEXTS = st.lists(PIECES, min_size=1, max_size=7).map("".join)
ROLES = st.sampled_from(["system", "user", "assistant"])
CHATS = st.lists(st.one_of(TEXTS, st.lists(st.tuples(ROLES, TEXTS), min_size=1, max_size=4)), min_size=1, max_size=9)


def all_values(prompt):
    return Counter(value.canonical for message in prompt.messages for value in values_in(message.text))


@settings(max_examples=150, deadline=None)
@given(CHATS)
def test_safe_repairs_settle_and_lose_no_id_role_or_value(texts):
    before = prompts(*texts)
    after = safely_repaired(before).prompts
    assert safely_repaired(after).changes == {}
    for old, new in zip(before, after, strict=True):
        assert (new.number, new.custom_id) == (old.number, old.custom_id)
        assert sorted(message.role for message in new.messages) == sorted(message.role for message in old.messages)
        assert all_values(new) == all_values(old)


@settings(max_examples=100, deadline=None)
@given(CHATS)
def test_a_finding_costs_what_its_repair_saves(texts):
    given_prompts = prompts(*texts)
    report = lint(given_prompts, PrefixCosts(4))
    by_kind = {detector.kind: detector for detector in DETECTORS}
    costs = PrefixCosts(4)
    assert report.distinct_tokens == costs.distinct_tokens(given_prompts)
    assert report.distinct_tokens_fixed == costs.distinct_tokens(report.fix.prompts)
    for finding in report.findings:
        repaired = by_kind[finding.kind].repair(given_prompts)
        assert finding.requests >= len(finding.spots) > 0
        assert finding.tokens == report.distinct_tokens - costs.distinct_tokens(repaired.prompts)
        assert max(finding.tokens, finding.tokens_in_turn) >= 4
    done = given_prompts
    for detector in DETECTORS:
        done = detector.repair(done).prompts
    assert report.distinct_tokens_repaired == costs.distinct_tokens(done)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(ROLES, st.one_of(TEXTS, st.text())), min_size=1, max_size=4))
def test_units_put_together_are_the_prompt(messages):
    (prompt,) = prompts(messages)
    assert from_units(prompt, list(units(prompt))) == prompt


def test_the_shipped_example_is_clean(tmp_path):
    from tests.docs.test_documents import TOP

    assert lint(read_prompts(TOP / "examples" / "catalogue.jsonl"), PrefixCosts(64)).findings == ()


def test_time_grows_with_the_input_and_not_with_its_square():
    def seconds(count):
        systems = (f"Now: 2026-11-{n % 28 + 1:02d}. Request {n}.\n{RULES}{MORE}" for n in range(count))
        texts = prompts(*([*chat[:-1], ("user", f"{MORE}\n\nStar {n}?")] for n, chat in enumerate(chats(*systems))))
        start = time.perf_counter()
        lint(texts, PrefixCosts(64))
        return time.perf_counter() - start

    seconds(100)
    assert seconds(1600) < 12 * max(0.1, seconds(400))


def test_a_line_with_tool_calls_keeps_them(tmp_path):
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    message = {"role": "assistant", "content": "x", "tool_calls": calls}
    line = {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [message]}}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    (prompt,) = read_prompts(tmp_path / "in.jsonl")
    assert prompt.messages[0].plain == message
