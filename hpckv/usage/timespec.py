"""Times as `sacct` reads and writes them."""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta

from hpckv.errors import ConfigError

_UNITS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 7 * 86400}
_RELATIVE = re.compile(r"now(?:(?P<sign>[+-])(?P<count>\d+)(?P<unit>[a-z]*))?")
_WORDS = {"midnight": 0, "noon": 12, "fika": 15, "teatime": 16}
_CLOCK = re.compile(r"(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2}))?\s*(?P<half>[AaPp][Mm])?")
_DATES = (
    r"(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})",
    r"(?P<month>\d{2})(?P<day>\d{2})(?P<year>\d{2})?",
    r"(?P<month>\d{1,2})/(?P<day>\d{1,2})(?:/(?P<year>\d{2}|\d{4}))?",
    r"(?P<day>\d{1,2})\.(?P<month>\d{1,2})(?:\.(?P<year>\d{2}|\d{4}))?",
)


def parse_time(text: str, flag: str, now: float | None = None) -> float:
    """Seconds since 1970, local time as `sacct`; raises `ConfigError` naming the flag.

    `now`, `now-7days`, `today`, `tomorrow`, `midnight`, `noon`, `HH:MM[:SS] [AM|PM]`, `MMDD[YY]`, `MM/DD[/YY][-HH:MM[:SS]]`,
    `DD.MM[.YY]`, `YYYY-MM-DD[THH:MM[:SS]]`.
    """
    here = datetime.fromtimestamp(time.time() if now is None else now)
    try:
        return _parse(text.strip().lower(), here).timestamp()
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{flag} {text}: no time as sacct reads it, for example 2026-11-01T09:00, today or now-7days"
        ) from None


def _parse(text: str, now: datetime) -> datetime:
    if relative := _RELATIVE.fullmatch(text):
        return now + timedelta(seconds=_shift(relative))
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if text in ("today", "tomorrow"):
        return today + timedelta(days=text == "tomorrow")
    if text in _WORDS:
        return today.replace(hour=_WORDS[text])
    if _CLOCK.fullmatch(text):
        return _at(today, text)
    date, mark, clock = text.partition("t" if re.match(r"\d{4}-", text) else "-")
    for pattern in _DATES:
        if found := re.fullmatch(pattern, date):
            year = int(found["year"]) if found["year"] else now.year
            day = datetime(year + 2000 if year < 100 else year, int(found["month"]), int(found["day"]))
            return _at(day, clock) if mark else day
    raise ValueError


def _shift(found: re.Match[str]) -> int:
    if found["count"] is None:
        return 0
    unit = found["unit"] or "seconds"
    matching = [seconds for name, seconds in _UNITS.items() if name.startswith(unit) or name == unit]
    if len(matching) != 1:
        raise ValueError
    return int(found["count"]) * matching[0] * (-1 if found["sign"] == "-" else 1)


def _at(day: datetime, clock: str) -> datetime:
    found = _CLOCK.fullmatch(clock)
    if found is None:
        raise ValueError
    hour = int(found["hour"])
    if half := found["half"]:
        if not 1 <= hour <= 12:
            raise ValueError
        hour = hour % 12 + 12 * (half == "pm")
    return day.replace(hour=hour, minute=int(found["minute"]), second=int(found["second"] or 0))


def format_elapsed(seconds: float) -> str:
    """[DD-]HH:MM:SS"""
    whole = round(abs(seconds))
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return ("-" if seconds < 0 and whole else "") + (f"{days:02d}-{text}" if days else text)


def format_time(t: float) -> str:
    """YYYY-MM-DDTHH:MM:SS, local time."""
    return datetime.fromtimestamp(t).strftime("%Y-%m-%dT%H:%M:%S")
