"""Times as sacct takes them."""

import ctypes
import os
import time
from datetime import datetime
from pathlib import Path

import pytest

from hpckv.errors import ConfigError
from hpckv.usage.timespec import format_elapsed, parse_time

NOW = datetime(2026, 11, 22, 15, 30, 10).timestamp()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("now", (2026, 11, 22, 15, 30, 10)),
        ("now-7days", (2026, 11, 15, 15, 30, 10)),
        ("now-1week", (2026, 11, 15, 15, 30, 10)),
        ("now-90", (2026, 11, 22, 15, 28, 40)),
        ("now+2hours", (2026, 11, 22, 17, 30, 10)),
        ("now-5min", (2026, 11, 22, 15, 25, 10)),
        ("now - 1 hour", (2026, 11, 22, 14, 30, 10)),
        ("today", (2026, 11, 22)),
        ("today-09:00", (2026, 11, 22, 9)),
        ("midnight", (2026, 11, 22)),
        ("tomorrow", (2026, 11, 23)),
        ("noon", (2026, 11, 22, 12)),
        ("elevenses", (2026, 11, 22, 11)),
        ("11/03-teatime", (2026, 11, 3, 16)),
        ("fika tomorrow", (2026, 11, 23, 15)),
        ("09:05", (2026, 11, 22, 9, 5)),
        ("9:05:30 PM", (2026, 11, 22, 21, 5, 30)),
        ("12:00 AM", (2026, 11, 22)),
        ("1103", (2026, 11, 3)),
        ("110325", (2025, 11, 3)),
        ("11/03", (2026, 11, 3)),
        ("11/03/25-09:00", (2025, 11, 3, 9)),
        ("3.11.25", (2025, 3, 11)),
        ("11.03", (2026, 11, 3)),
        ("11/30", (2026, 11, 30)),  # of this month, though it is yet to come
        ("12/03", (2025, 12, 3)),
        ("1203", (2025, 12, 3)),
        ("2026-11-01", (2026, 11, 1)),
        ("2026-11-1", (2026, 11, 1)),
        ("2026-1-1", (2026, 1, 1)),
        ("2026-11-01T09:00", (2026, 11, 1, 9)),
        ("2026-11-01T09:00:30", (2026, 11, 1, 9, 0, 30)),
    ],
)
def test_sacct_s_forms(text, found):
    assert parse_time(text, "-S", NOW) == datetime(*found).timestamp()


def test_seconds_since_1970_are_of_no_zone():
    assert parse_time("uts1700000000", "-S", NOW) == 1_700_000_000


def test_days_before_now_have_24_hours_also_where_clocks_change(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        now = datetime(2026, 10, 26, 12).timestamp()  # the day after summer's end
        assert parse_time("now-2days", "-S", now) == now - 2 * 86400
    finally:
        monkeypatch.undo()
        time.tzset()


REFUSED = [
    "",
    "yesterday-ish",
    "now-",
    "now-7moons",
    "2026-13-01",
    "25:00",
    "13:00 PM",
    "26",
    "12",
    "11/32",
    "uts999999",
]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_time_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"-S .*no time as sacct reads it"):
        parse_time(text, "-S", NOW)


SLURM = [path for depth in ("*", "*/*") for path in Path("/usr").glob(f"lib{depth}/slurm*/libslurmfull.so")]


@pytest.mark.skipif(not (SLURM or os.environ.get("CI")), reason="no libslurmfull.so, which has Slurm's own parser")
def test_slurm_s_own_parser_reads_the_same(capfd):
    read = ctypes.CDLL(str(SLURM[0])).slurm_parse_time
    read.argtypes, read.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_long
    months = [text for month in range(1, 13) for text in (f"{month:02d}15", f"{month}/7", f"{month:02d}.28-09:00")]
    days = [
        "today",
        "tomorrow",
        "today-09:00",
        "2026-11-1",
        "2026-02-30",
        "110325",
        "3.11.25",
        "11/03/25-9:00 pm",
        "113",
    ]
    times = ["midnight", "noon tomorrow", "fika", "11/03-teatime", "9:05:30 PM", "0:30 pm", "12:00 AM", "2026-11-01T"]
    for text in [*months, *days, *times, "2026-11-01T09:00:30", "uts1700000000"]:
        assert parse_time(text, "-S") == read(text.encode(), 1), text
    for text in ("now", "now-7days", "now - 1 hour", "now+90", "now-1WEEK"):
        before, found, after = parse_time(text, "-S"), read(text.encode(), 1), parse_time(text, "-S")
        assert int(before) <= found <= after, text
    for text in filter(None, REFUSED):  # nothing at all is 1970 to sacct
        assert read(text.encode(), 1) == 0, text
    capfd.readouterr()  # it says so of each


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00:00"), (59.6, "00:01:00"), (90061, "01-01:01:01"), (-61, "-00:01:01"), (-0.1, "00:00:00")],
)
def test_elapsed_time(seconds, text):
    assert format_elapsed(seconds) == text
