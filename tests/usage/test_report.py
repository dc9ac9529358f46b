"""The page and its figures: what was done, as it was done, whoever wrote the ledger and however many they are."""

import random
import re
import time
from dataclasses import replace
from datetime import datetime

import pytest

from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.columns import COLUMNS
from hpckv.usage.gather import gather
from hpckv.usage.points import PointsConfig
from hpckv.usage.query import Accounts, Question
from hpckv.usage.report.draw import png
from hpckv.usage.report.figures import MatrixFigure, periods
from hpckv.usage.report.page import render_page, render_pngs
from hpckv.usage.report.palette import DARK, HEAT, HEAT_INK, LIGHT
from hpckv.usage.report.sections import accrued, period_of
from tests.usage.browser import Browser
from tests.usage.html_page import Page
from tests.usage.made_up_past import NAMES, make_past, report_of

pytestmark = pytest.mark.root

END = datetime(2026, 11, 15).timestamp()
DAY = 86400.0
PAPER = 1031
"""CSS pixels of A4 across, less the margins."""
HOSTILE = (
    "<script>document.hacked = 1</script>",
    '"><img src=x onerror="document.hacked = 2">',
    "a\u202egnp.exe",
    "$x^2$ \\frac{",
    "]]></svg><b>",
    "tab\there\x00\x1b[31m",
    "&amp; {{ 7 * 7 }} {% raw %}",
    "x" * 300,
)


def page_of(store, start=END - 40 * DAY, end=END, only=(), **more) -> tuple[Page, str]:
    """With `only`, of the sections with these names."""
    report, found = report_of(store, start, end, **more)
    if only:
        report = replace(report, sections=[section for section in report.sections if section.name in only])
    html = render_page(report, found, version="1", now=END)
    return Page(html), html


@pytest.fixture
def store(tmp_path) -> StoreRoot:
    return StoreRoot.create(tmp_path / "kv", StorePolicy.new())


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Six weeks of seven users: the store, what is true of it, and its page."""
    store = StoreRoot.create(tmp_path_factory.mktemp("usual") / "kv", StorePolicy.new())
    truth = make_past(store, end=END)
    report, found = report_of(store, END - 40 * DAY, END)
    return store, truth, report, render_page(report, found, version="1", now=END)


def by_columns(page: Page, first: str):
    return next(table for table in page.tables if table.columns[0] == first)


def test_every_number_is_what_was_done(usual):
    _, truth, _, html = usual
    page = Page(html)
    for first, sums in (
        ("User", {NAMES[uid]: counts for uid, counts in truth.by_user.items()}),
        ("Model", truth.by_model),
        ("Day", truth.by_day),
    ):
        table = by_columns(page, first)
        for name in ("PromptTok", "HitTok", "DeviceTok", "HostTok", "LocalTok", "SharedTok", "Computed"):
            assert table.numbers(name) == {key: counts[name] for key, counts in sums.items()}
    growth = next(table for table in page.tables if "StoreWritten" in table.columns)
    assert growth.numbers("StoreWritten") == {day: counts["StoreWritten"] for day, counts in truth.by_day.items()}
    tiers = by_columns(page, "Where")
    assert {row[1][0]: float(row[2][1]) for row in tiers.rows} == {
        name: truth.total[name] for name in ("DeviceTok", "HostTok", "LocalTok", "SharedTok", "Computed")
    }
    all_pairs = [table for table in page.tables if table.columns[:2] == ["Writer", "Reader"]][-1]
    found = {(row[0][0], row[1][0]): int(row[2][1]) for row in all_pairs.rows}
    assert found == {(NAMES[w], NAMES[r]): tokens for (w, r), tokens in truth.by_pair.items()}
    for name in ("Requests", "PromptTok", "HitTok", "Computed", "StoreWritten"):
        assert int(page.facts[name]) == truth.total[name]


def test_figures_are_drawn_from_the_numbers_of_their_tables(usual):
    _, truth, report, html = usual
    hits = next(section for section in report.sections if section.name == "hits-over-time")
    assert sum(sum(series.values) for series in hits.figure.panels[0].series) == truth.total["PromptTok"]
    matrix = next(section for section in report.sections if section.name == "who-saved-whom").figure
    assert sum(map(sum, matrix.cells)) == sum(truth.by_pair.values())
    rank = {name: n for n, name in enumerate(matrix.names)}
    assert matrix.cells[rank["bkowalski"]][rank["alice"]] == truth.by_pair[2001, 2002]
    day, counts = max(truth.by_day.items(), key=lambda item: item[1]["SharedTok"])
    assert f"<title>{day}, shared store: {counts['SharedTok']:,} tokens</title>" in html
    assert f"<title>bkowalski loaded {truth.by_pair[2001, 2002]:,} tokens written by alice</title>" in html


def test_the_page_needs_nothing_from_elsewhere(usual):
    page, html = Page(usual[3]), usual[3]
    assert all(re.fullmatch(r"#[\w-]+", reference) for reference in page.references), set(page.references)
    assert not {"script", "img", "link", "iframe", "object", "image", "use"} & (set(page.tags) - {"use"})
    assert "@import" not in html
    assert set(re.findall(r"\w+://[^\s\"<]*", html)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert (
        len(re.findall('role="img" aria-labelledby="[^"]+" aria-describedby="[^"]+"', html))
        == 2 * len(usual[2].sections)
        == page.tags.count("svg")
    )
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_what_a_ledger_says_is_text_and_nothing_else(store, tmp_path):
    uids = tuple(range(2001, 2001 + len(HOSTILE)))
    make_past(store, end=END, num_days=3, uids=uids, models=HOSTILE, jobs_a_day=60)
    torn = next(store.layout.users.glob("*/ledger/*")) / "<img src=x onerror=document.hacked=3>.jsonl"
    torn.write_text("{")
    page, html = page_of(store, END - 3 * DAY, name_of=lambda uid: HOSTILE[uid - 2001])
    assert not {"script", "img"} & set(page.tags)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", html)
    shown = set(by_columns(page, "User").numbers("PromptTok")) | set(by_columns(page, "Model").numbers("PromptTok"))
    assert shown == {re.sub("[\t\x00\x1b\u202e]", "?", name) for name in HOSTILE}
    assert "onerror=document.hacked=3&gt;.jsonl" in html
    assert "49" not in {row[0][0] for table in page.tables for row in table.rows}
    (tmp_path / "page.html").write_text(html)
    with Browser() as browser:
        browser.open(tmp_path / "page.html", width=1200)
        assert browser.complaints == []
        assert browser.evaluate(
            "document.hacked === undefined && document.querySelectorAll('script, img').length === 0"
        )
        assert browser.evaluate(
            "[...document.querySelectorAll('svg text')].some(t => t.textContent === '$x^2$ \\\\frac{')"
        )


LAYOUT = """(() => {
  const seen = [...document.querySelectorAll('svg')].filter(one => one.getClientRects().length);
  const said = element => element.closest('svg').id || element.closest('section').id;
  const problems = [];
  for (const svg of seen) {
    const whole = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll('text')];
    if (whole.width < 300 || whole.height < 50) problems.push(`${said(svg)} is ${whole.width} x ${whole.height}`);
    const boxes = texts.map(text => [text, text.getBoundingClientRect()]);
    for (const [text, box] of boxes) {
      if (box.height < 9) problems.push(`${text.textContent} is ${box.height} high`);
      if (box.left < whole.left - 1 || box.right > whole.right + 1 || box.top < whole.top - 1 || box.bottom > whole.bottom + 1)
        problems.push(`${said(svg)}: ${text.textContent} is cut off`);
    }
    const level = boxes.filter(([text]) => !/rotate\\((?!-?0[ ,)])/.test(text.getAttribute('transform') || ''));
    for (const [one, a] of level) for (const [other, b] of level)
      if (one !== other && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
          && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2)
        problems.push(`${said(svg)}: ${one.textContent} lies over ${other.textContent}`);
  }
  for (const fact of document.querySelectorAll('.facts dd')) {
    const lines = fact.getBoundingClientRect().height / parseFloat(getComputedStyle(fact).fontSize);
    if (lines > 1.9) problems.push(`${fact.textContent} is broken`);
  }
  if (document.documentElement.scrollWidth > innerWidth) problems.push('the page is wider than the window');
  return {count: seen.length, problems, ground: getComputedStyle(document.documentElement).backgroundColor};
})()"""


def test_a_browser_shows_all_of_it_wide_and_narrow_light_and_dark(usual, tmp_path):
    _, _, report, html = usual
    (tmp_path / "page.html").write_text(html)
    grounds = {}
    with Browser() as browser:
        for width in (1200, 400):
            for is_dark in (False, True):
                browser.open(tmp_path / "page.html", width=width, is_dark=is_dark)
                found = browser.evaluate(LAYOUT)
                assert (browser.complaints, found["problems"]) == ([], [])
                assert browser.requests == [(tmp_path / "page.html").as_uri()]
                assert found["count"] == len(report.sections)
                grounds[is_dark] = found["ground"]
                assert browser.described_images == {section.title: section.alt for section in report.sections}
        browser.open(tmp_path / "page.html", width=PAPER, medium="print")
        assert browser.evaluate(LAYOUT)["problems"] == []
        browser.open(tmp_path / "page.html", width=1200, is_dark=True)  # paper is light all the same
        pages = browser.pdf().count(b"/Type /Page\n")
    assert grounds == {False: "rgb(255, 255, 254)", True: "rgb(21, 24, 28)"}
    assert 5 <= pages <= 20


def test_many_users_are_the_largest_and_others_and_all_of_them_can_be_unfolded(store, tmp_path):
    truth = make_past(store, end=END, num_days=20, uids=tuple(range(3000, 3400)), jobs_a_day=40)
    page, html = page_of(store)
    largest, everybody = [table for table in page.tables if table.columns[0] == "User"]
    assert len(largest.rows) == 13
    assert largest.rows[-1][0] == (f"{len(truth.by_user) - 12} others", None)
    prompt = largest.columns.index("PromptTok")
    assert sum(int(row[prompt][0].replace(",", "")) for row in largest.rows) == truth.total["PromptTok"]
    assert int(largest.total[prompt][1]) == truth.total["PromptTok"]
    assert everybody.numbers("PromptTok") == {f"u{uid}": sums["PromptTok"] for uid, sums in truth.by_user.items()}
    (tmp_path / "page.html").write_text(html)
    with Browser() as browser:
        for width in (1200, 400):
            browser.open(tmp_path / "page.html", width=width)
            assert browser.evaluate(LAYOUT)["problems"] == []


def test_one_hour_of_one_user_two_days_and_four_years_fit_as_well(tmp_path):
    pasts = {
        "an-hour": ({"num_days": 0.05, "uids": (2001,), "jobs_a_day": 200}, "Hour"),
        "two-days": ({"num_days": 1.5, "jobs_a_day": 12}, "Hour"),
        "a-year": ({"num_days": 300, "jobs_a_day": 0.5}, "Week"),
        "years": ({"num_days": 1400, "jobs_a_day": 0.2}, "Month"),
    }
    for name, (past, unit) in pasts.items():
        store = StoreRoot.create(tmp_path / name, StorePolicy.new())
        truth = make_past(store, end=END, **past)
        page, html = page_of(store, END - 1500 * DAY)
        assert sum(by_columns(page, unit).numbers("PromptTok").values()) == truth.total["PromptTok"]
        (tmp_path / f"{name}.html").write_text(html)
    with Browser() as browser:
        for name in pasts:
            for width in (1200, 400):
                browser.open(tmp_path / f"{name}.html", width=width)
                assert (name, browser.evaluate(LAYOUT)["problems"], browser.complaints) == (name, [], [])


def test_a_window_without_records_says_so_and_draws_nothing(store):
    make_past(store, end=END, num_days=2)
    report, found = report_of(store, END + DAY, END + 2 * DAY)
    assert "No records in this window" in render_page(report, found, version="1")
    assert list(render_pngs(report)) == []


def test_filters_are_those_of_the_question_and_are_said(usual):
    store, truth, _, _ = usual
    page, html = page_of(store, only=("hits-by-user", "hits-by-model"), uids=[2002], models=["qwen3-32b"])
    assert list(by_columns(page, "User").numbers("PromptTok")) == ["bkowalski"]
    assert list(by_columns(page, "Model").numbers("PromptTok")) == ["qwen3-32b"]
    assert "users <bdi>bkowalski</bdi>; models <bdi>qwen3-32b</bdi>" in html
    assert all("-u 2002 --model qwen3-32b" in command for command in page.commands)
    assert 0 < int(page.facts["PromptTok"]) < truth.by_user[2002]["PromptTok"]


def test_without_prices_savings_are_in_gpu_hours(usual):
    page, html = page_of(usual[0], only=("hits-by-user", "savings"), points=PointsConfig())
    assert "Points" not in page.facts
    assert not any("Points" in name for table in page.tables for name in table.columns)
    assert "GPU-hours used and saved" in html


def test_pictures_are_the_same_whatever_the_user_s_own_settings(usual):
    import matplotlib as mpl

    figure = usual[2].sections[0].figure
    plain = png(figure)
    with mpl.rc_context({"font.size": 40, "axes.facecolor": "red", "text.usetex": True}):
        assert png(figure) == plain
    assert plain[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(plain) > 10_000


def test_every_figure_is_a_picture_too(usual):
    assert [name for name, _ in render_pngs(replace(usual[2], sections=usual[2].sections[4:]))] == [
        "who-saved-whom.png",
        "store-growth.png",
        "savings.png",
    ]


def test_an_empty_matrix_and_a_name_in_no_font_are_drawn():
    assert png(MatrixFigure(["名前"], [[0]]))[:4] == b"\x89PNG"


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_read_and_told_apart_by_lightness(colours):
    """WCAG 2.2: 4.5 for text, 3 for what figures are made of; tiers that lie on each other also differ without colour."""
    for role in ("ink", "frame"):
        assert contrast(colours[role], colours["paper"]) >= 4.5
    for role in ("device", "host", "local", "shared", "hatch", "line"):
        assert contrast(colours[role], colours["paper"]) >= 3
    for one, other in (("device", "host"), ("host", "local"), ("local", "shared")):
        assert contrast(colours[one], colours[other]) >= 1.2
    for heat, ink in zip(HEAT, HEAT_INK, strict=True):
        assert contrast(colours[heat], colours[ink]) >= 4.5
    assert len(set(colours.values())) == len(colours) == len(LIGHT)


def test_periods_leave_none_out():
    assert periods("2026-02-27", "2026-03-01", "day")[0] == ["2026-02-27", "2026-02-28", "2026-03-01"]
    assert periods("2025-12-29", "2026-01-05", "week")[0] == ["2025-12-29", "2026-01-05"]
    labels, starts = periods("2025-12", "2026-01", "month")
    assert (labels, starts[-1]) == (["2025-12", "2026-01"], datetime(2026, 2, 1))
    assert periods("2026-03-01T23", "2026-03-02T00", "hour")[0] == ["2026-03-01T23", "2026-03-02T00"]
    assert [period_of(0, days * DAY) for days in (0, 2, 3, 62, 63, 730, 731)] == [
        "hour", "hour", "day", "day", "week", "week", "month",
    ]  # fmt: skip


def test_what_disk_has_cost_by_then_ends_at_what_it_costs():
    """10 TB written at noon of day 1, 0.5 points a TB and day, asked for until the end of day 3: 2.5 days."""
    ends = [datetime(2026, 11, day) for day in (2, 3, 4)]
    until = ends[-1].timestamp()
    assert accrued(ends, [1e13, 0, None], [12.5, 0, None], until, 0.5) == pytest.approx([2.5, 7.5, 12.5])
    assert accrued(ends[:1], [1e13], [0.5], ends[0].timestamp() - 36000, 0.5) == pytest.approx([0.5])


def sums(store, group: str, name: str) -> dict[str, int]:
    found = gather([store.layout.root], [], 0, END + DAY)
    columns = [COLUMNS[group], COLUMNS[name]]
    return dict(Accounts(found, PointsConfig(), str).ask(Question(0, END, group=group, columns=columns)).rows)


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Asia/Kolkata", "America/New_York"])
def test_hours_weeks_and_months_are_made_of_the_local_days_also_where_clocks_change(zone, store, monkeypatch):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        truth = make_past(store, end=END, num_days=60, jobs_a_day=4, seed=random.Random(zone).randrange(100))
        days = {day: counts["PromptTok"] for day, counts in truth.by_day.items()}
        assert sums(store, "day", "prompttok") == days
        for group, of_label in (
            ("hour", lambda label: label[:10]),
            ("month", None),
            ("week", None),
        ):
            found = sums(store, group, "prompttok")
            assert list(found) == sorted(found)
            assert sum(found.values()) == sum(days.values())
            if of_label:
                by_day: dict[str, int] = {}
                for label, count in found.items():
                    by_day[of_label(label)] = by_day.get(of_label(label), 0) + count
                assert by_day == days
        assert sums(store, "month", "prompttok")["2026-10"] == sum(n for day, n in days.items() if day[:7] == "2026-10")
        assert sums(store, "week", "prompttok")["2026-10-19"] == sum(
            days.get(f"2026-10-{day}", 0) for day in range(19, 26)
        )
    finally:
        monkeypatch.undo()
        time.tzset()
