"""Times as sacct takes them."""

from datetime import datetime

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
        ("today", (2026, 11, 22)),
        ("midnight", (2026, 11, 22)),
        ("tomorrow", (2026, 11, 23)),
        ("noon", (2026, 11, 22, 12)),
        ("09:05", (2026, 11, 22, 9, 5)),
        ("9:05:30 PM", (2026, 11, 22, 21, 5, 30)),
        ("12:00 AM", (2026, 11, 22)),
        ("1103", (2026, 11, 3)),
        ("110325", (2025, 11, 3)),
        ("11/03", (2026, 11, 3)),
        ("11/03/25-09:00", (2025, 11, 3, 9)),
        ("3.11.25", (2025, 11, 3)),
        ("2026-11-01", (2026, 11, 1)),
        ("2026-11-01T09:00", (2026, 11, 1, 9)),
        ("2026-11-01T09:00:30", (2026, 11, 1, 9, 0, 30)),
    ],
)
def test_sacct_s_forms(text, found):
    assert parse_time(text, "-S", NOW) == datetime(*found).timestamp()


@pytest.mark.parametrize(
    "text", ["", "yesterday-ish", "now-", "now-7moons", "2026-13-01", "25:00", "13:00 PM", "2026-11-01T"]
)
def test_what_is_no_time_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"-S .*no time as sacct reads it"):
        parse_time(text, "-S", NOW)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00:00"), (59.6, "00:01:00"), (90061, "01-01:01:01"), (-61, "-00:01:01"), (-0.1, "00:00:00")],
)
def test_elapsed_time(seconds, text):
    assert format_elapsed(seconds) == text
