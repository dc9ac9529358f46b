"""`hpckv acct --report` and `--png`: every number on the page is what `hpckv acct --json` says when asked as the page says."""

import json
import os
import shlex
import subprocess
import sys
from datetime import datetime

import pytest

from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from tests.cli.runs import hpckv
from tests.usage.html_page import Page
from tests.usage.made_up_past import make_past

pytestmark = pytest.mark.root

WINDOW = ("-S", "2026-10-20", "-E", "2026-11-15")
FIGURES = (
    "hits-by-model hits-by-tier hits-by-user hits-over-time savings store-growth who-saved-whom".split()  # noqa: SIM905
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a store `kv`, and a site file."""
    folder = tmp_path_factory.mktemp("report")
    store = StoreRoot.create(folder / "kv", StorePolicy.new())
    make_past(store, end=datetime(2026, 11, 15).timestamp(), num_days=40)
    (folder / "site.yaml").write_text("points: {prices: [{gpu: H100, per_gpu_hour: 0.23}], disk_tb_day: 0.05}")
    torn = next(store.layout.users.glob("2001/ledger/2026-11/*.jsonl"))
    with torn.open("ab") as file:
        file.write(b'{"v":1,"torn')
    return folder


def test_the_page_s_numbers_are_those_of_the_commands_it_names(place):
    page_path, pictures = place / "out.html", place / "png"
    arguments = ("--store", place / "kv", "--site", place / "site.yaml", *WINDOW, "-u", "2001,2002,2005")
    done = hpckv("acct", *arguments, "--report", page_path, "--png", pictures)
    assert done.returncode == 0, done.stderr
    assert "do not verify" in done.stderr
    assert done.stdout.splitlines()[0] == str(page_path)
    assert sorted(path.name for path in pictures.iterdir()) == [f"{name}.png" for name in FIGURES]
    page = Page(page_path.read_text())
    assert "do not verify" in page_path.read_text()
    answers = {command: asked(command) for command in page.commands}
    for name, raw in page.facts.items():
        assert float(raw) == pytest.approx(answers[page.commands[0]]["total"][name], rel=1e-12)
    compared = 0
    for table in page.tables:
        answer = answers[table.command]
        names = list(answer["columns"])
        if table.columns[0] == "Where":
            assert {row[1][0]: int(row[2][1]) for row in table.rows} == {n: answer["total"][n] for n in names[:-1]}
            continue
        for row, wanted in zip(table.rows, answer["rows"], strict=False):
            for name, (text, raw) in zip(table.columns, row, strict=True):
                if raw is not None:
                    assert float(raw) == pytest.approx(wanted[name], rel=1e-12)
                    compared += 1
                elif name in wanted and "others" not in row[0][0]:
                    assert text == ("" if wanted[name] is None else wanted[name])
        for name, (_, raw) in zip(table.columns, table.total, strict=bool(table.total)):
            assert raw is None or float(raw) == pytest.approx(answer["total"][name], rel=1e-12)
        assert len(table.rows) >= min(13, len(answer["rows"]))
    assert compared > 500


def asked(command: str) -> dict:
    done = hpckv(*shlex.split(command)[1:], "--json")
    assert done.returncode == 0, (command, done.stderr)
    return json.loads(done.stdout)


def test_a_window_without_records_is_a_page_that_says_so(place, tmp_path):
    done = hpckv(
        "acct", "--store", place / "kv", "-S", "2020-01-01", "-E", "2020-02-01", "--report", tmp_path / "a.html"
    )
    assert (done.returncode, done.stderr) == (0, "no records in this window\n")
    assert "No records in this window" in (tmp_path / "a.html").read_text()


def test_the_page_gets_the_mode_that_the_umask_says(place, tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        page = tmp_path / f"{mask}.html"
        done = hpckv(
            "acct", "--store", place / "kv", "-S", "2020-01-01", "-E", "2020-02-01", "--report", page, umask=mask
        )
        assert (done.returncode, page.stat().st_mode & 0o777) == (0, mode)


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["--report", "out.html", "--csv"], 64, "--report shows what it shows; --csv is for the printed table"),
        (["--png", "out", "-o", "User", "--group-by", "user"], 64, "-o, --group-by is for the printed table"),
        (["--report", "."], 64, "is a folder; name the page"),
        (["--report", "nowhere/out.html"], 73, "no folder"),
        (["--png", "nowhere/pictures"], 73, "no folder"),
        (["--png", __file__], 64, "is a file; name a folder"),
    ],
)
def test_what_cannot_be_is_said_before_the_ledger_is_read(place, tmp_path, arguments, code, what):
    done = hpckv("acct", "--store", place / "kv", *WINDOW, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert what in done.stderr
    assert os.listdir(tmp_path) == []


def test_without_matplotlib_one_line_says_what_to_install(place, tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        f"sys.argv = ['hpckv', 'acct', '--store', {str(place / 'kv')!r}, *sys.argv[1:]]\n"
        "from hpckv.cli.main import main; main()"
    )
    ask = [sys.executable, "-c", code]
    done = subprocess.run([*ask, "--report", tmp_path / "a.html"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 78
    assert done.stderr.startswith("hpckv: --report draws with matplotlib, which cannot be imported (")
    assert done.stderr.endswith("): pip install 'hpckv[report]'\n")
    assert done.stderr.count("\n") == 1
    table = subprocess.run([*ask, *WINDOW, "--group-by", "user"], capture_output=True, text=True, timeout=60)
    assert table.returncode == 0, table.stderr
