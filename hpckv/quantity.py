"""Sizes, counts and durations as people write them: `64GiB` to bytes and back. Nothing else."""

from __future__ import annotations

import re

from hpckv.errors import ConfigError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _UNITS[_letter] = _UNITS[_letter + "iB"] = 1024**_power
    _UNITS[_letter + "B"] = 1000**_power
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)\s*")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class ByteSize(int):
    """A number of bytes in a configuration; written `200GiB`, `4GB`, `512M` (binary) or a plain number."""

    @classmethod
    def parse(cls, value: object) -> ByteSize:
        """Read a size; raises `ConfigError` for anything else."""
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return cls(value)
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if match is None or match[2] not in _UNITS:
            raise ConfigError(f"{value!r} is not a size; write for example 512MiB, 32GiB or 2TB")
        try:
            return cls(float(match[1]) * _UNITS[match[2]])
        except OverflowError:
            raise ConfigError(f"{match[0][:20]}... is more bytes than there are") from None

    def __str__(self) -> str:
        return format_bytes(self)


def parse_duration(value: str) -> float:
    """`5min`, `1h`, `7d`, `90s` -> seconds; raises `ConfigError` for anything else."""
    match = _DURATION.fullmatch(value)
    if match is None:
        raise ConfigError(f"{value!r} is not a duration; write for example 5min, 1h or 7d")
    return float(match[1]) * _SECONDS[match[2]]


def format_bytes(num_bytes: float) -> str:
    """`1536` -> `1.5KiB`; exact multiples lose the fraction."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f}{unit}" if value == int(value) else f"{value:.1f}{unit}"


def format_count(count: float) -> str:
    """`41172` -> `41.2k`; below a thousand as it is."""
    value = float(count)
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5 or unit == "G":
            break
        value /= 1000
    return f"{value:.0f}{unit}" if not unit or abs(value) >= 100 else f"{value:.1f}{unit}"


def format_duration(seconds: float) -> str:
    """`3725` -> `1:02:05`, as Slurm writes elapsed time."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
