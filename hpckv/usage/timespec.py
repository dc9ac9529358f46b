"""Times as `sacct` reads and writes them."""

from __future__ import annotations

import re
from datetime import date, datetime, time, timedelta

from hpckv.errors import ConfigError

_UNITS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 7 * 86400}
_RELATIVE = re.compile(r"now\s*(?:(?P<sign>[+-])\s*(?P<count>\d+)\s*(?P<unit>[a-z]*))?")
_SINCE_1970 = re.compile(r"uts(\d+)")
_LEAST_SINCE_1970 = 1_000_000
_DAYS = {"today": 0, "tomorrow": 1}
_HOURS = {"midnight": 0, "elevenses": 11, "noon": 12, "fika": 15, "teatime": 16}
_WORD = re.compile("|".join((*_DAYS, *_HOURS)))
_CLOCK = re.compile(r"(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2}))?\s*(?P<half>[ap]m)?")
_DATES = (
    re.compile(r"(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})"),
    # Possessive: 26 is no month, and not the 6th of February either.
    re.compile(r"(?P<month>\d{1,2}+)[./]?(?P<day>\d{1,2}+)(?:[./]?(?P<year>\d{4}|\d{2}))?"),
)
_BETWEEN = re.compile(r"[\s-]|t")


def parse_time(text: str, flag: str, now: float | None = None) -> float:
    """Seconds since 1970, local time as `sacct`; raises `ConfigError` naming the flag.

    `now`, `now-7days`, `now - 1 hour`, `uts1700000000`; or a day, a time of the day or both, in any order with blanks, `-` or `T`
    between: `today`, `tomorrow`, `MMDD[YY]`, `MM/DD[/YY]`, `MM.DD[.YY]`, `YYYY-MM-DD`; `midnight`, `elevenses`, `noon`, `fika`,
    `teatime`, `HH:MM[:SS] [AM|PM]`. Without a year a month that is yet to come is last year's.
    """
    here = datetime.now() if now is None else datetime.fromtimestamp(now)
    try:
        return _parse(text.strip().lower(), here)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{flag} {text}: no time as sacct reads it, for example 2026-11-01T09:00, today or now-7days"
        ) from None


def _parse(text: str, now: datetime) -> float:
    if relative := _RELATIVE.fullmatch(text):
        return now.timestamp() + _shift(relative)
    if found := _SINCE_1970.fullmatch(text):
        if int(found[1]) < _LEAST_SINCE_1970:
            raise ValueError
        return float(found[1])
    day: date | None = None
    clock: time | None = None
    at = 0
    while at < len(text):
        if found := _WORD.match(text, at):
            if found[0] in _DAYS:
                day = now.date() + timedelta(days=_DAYS[found[0]])
            else:
                clock = time(_HOURS[found[0]])
        elif found := _CLOCK.match(text, at):
            clock = _clock(found)
        elif found := _DATES[0].match(text, at) or _DATES[1].match(text, at):
            day = _day(found, now)
        elif not (found := _BETWEEN.match(text, at)):
            raise ValueError
        at = found.end()
    if day is None and clock is None:
        raise ValueError
    return datetime.combine(day or now, clock or time()).timestamp()


def _shift(found: re.Match[str]) -> int:
    if found["count"] is None:
        return 0
    unit = found["unit"] or "seconds"
    matching = [seconds for name, seconds in _UNITS.items() if name.startswith(unit)]
    if len(matching) != 1:
        raise ValueError
    return int(found["count"]) * matching[0] * (-1 if found["sign"] == "-" else 1)


def _clock(found: re.Match[str]) -> time:
    hour = int(found["hour"])
    if half := found["half"]:
        if hour > 12:
            raise ValueError
        hour = hour % 12 + 12 * (half == "pm")
    return time(hour, int(found["minute"]), int(found["second"] or 0))


def _day(found: re.Match[str], now: datetime) -> date:
    month, day = int(found["month"]), int(found["day"])
    if not 1 <= day <= 31:
        raise ValueError
    if found["year"]:
        year = int(found["year"])
        year += 2000 if year < 100 else 0
    else:
        year = now.year - (month > now.month)
    return date(year, month, 1) + timedelta(days=day - 1)  # as sacct: the 30th of February is early in March


def format_elapsed(seconds: float) -> str:
    """[DD-]HH:MM:SS"""
    whole = round(abs(seconds))
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return ("-" if seconds < 0 and whole else "") + (f"{days:02d}-{text}" if days else text)


def format_time(t: float) -> str:
    """YYYY-MM-DDTHH:MM:SS, local time."""
    return datetime.fromtimestamp(t).strftime("%Y-%m-%dT%H:%M:%S")
