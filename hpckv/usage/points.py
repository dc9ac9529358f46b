"""What computing and storing cost, in a centre's points: the site file's `points:` section."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from hpckv.device.gpus import is_kind, words_of
from hpckv.errors import ConfigError
from hpckv.schema import Config, convert, read_site


class Price(Config, frozen=True):
    """What an hour costs, for jobs that fit: those of this partition, QoS and GPU, ended in [since, until)."""

    partition: str | None = None
    qos: str | None = None
    gpu: str | None = None
    """A part of the GPU's name, for example H100."""
    since: str | None = None
    """First day, YYYY-MM-DD, local time."""
    until: str | None = None
    """First day that it does not hold for."""
    per_gpu_hour: float | None = None
    per_node_hour: float | None = None
    gpus_per_node: int | None = None
    """With `per_node_hour`: over how many GPUs it is divided."""

    def __post_init__(self) -> None:
        if (self.per_gpu_hour is None) == (self.per_node_hour is None):
            raise ConfigError("points.prices: each has per_gpu_hour, or per_node_hour with gpus_per_node")
        if (self.per_node_hour is None) != (self.gpus_per_node is None):
            raise ConfigError("points.prices: per_node_hour and gpus_per_node belong together")
        if (self.gpus_per_node or 1) < 1 or not 0 <= self.of_gpu_hour < float("inf"):
            raise ConfigError("points.prices: a price below 0")
        for day in filter(None, (self.since, self.until)):
            _start_of(day)

    @property
    def of_gpu_hour(self) -> float:
        """Points."""
        if self.per_gpu_hour is not None:
            return self.per_gpu_hour
        assert self.per_node_hour is not None
        return self.per_node_hour / (self.gpus_per_node or 1)

    def fits(self, partition: str | None, qos: str | None, gpu: str, t: float) -> bool:
        """Whether a job that ends at `t` has this price; as `condition` says of a record."""
        if any(own is not None and own != asked for own, asked in ((self.partition, partition), (self.qos, qos))):
            return False
        since, until = (None if day is None else _start_of(day) for day in (self.since, self.until))
        is_its_gpu = self.gpu is None or is_kind(self.gpu, gpu)
        return is_its_gpu and (since is None or t >= since) and (until is None or t < until)

    @property
    def condition(self) -> tuple[str, list[object]]:
        """SQL over `records`, and its parameters."""
        parts: list[str] = ["TRUE"]
        values: list[object] = []
        for name in ("partition", "qos"):
            if (wanted := getattr(self, name)) is not None:
                parts.append(f"{name} = ?")
                values.append(wanted)
        if self.gpu is not None:
            parts.append("list_has_all(regexp_extract_all(lower(gpu), '[a-z0-9]+'), ?::VARCHAR[])")
            values.append(words_of(self.gpu))
        if self.since is not None:
            parts.append("t1 >= ?")
            values.append(_start_of(self.since))
        if self.until is not None:
            parts.append("t1 < ?")
            values.append(_start_of(self.until))
        return " AND ".join(parts), values


class CachePrices(Config, frozen=True):
    """Of a token, as a part of a computed one's."""

    read: float = 0.1
    """Found in a cache."""
    write_short: float = 1.25
    """Computed and kept for less than an hour, or as long as the store's default."""
    write_long: float = 2.0
    """Computed and kept for an hour or longer."""

    def __post_init__(self) -> None:
        if self.read < 0 or min(self.write_short, self.write_long) < 1:
            raise ConfigError("points.cache: read is at least 0, write_short and write_long at least 1")


class PointsConfig(Config, frozen=True):
    """A centre's prices (`points:` in the site file)."""

    prices: list[Price] = []
    """The first that fits a record counts; what none fits costs 0 and is said."""
    cache: CachePrices = CachePrices()
    disk_tb_day: float = 0.0
    """Points for 10^12 bytes in a store for a day."""
    balance: str | None = None
    """Command that prints what the project has left."""

    def of_gpu_hour(self, partition: str | None, qos: str | None, gpu: str, t: float) -> float | None:
        """Points of a GPU-hour of a job that ends at `t`; None if no price fits."""
        return next((price.of_gpu_hour for price in self.prices if price.fits(partition, qos, gpu, t)), None)

    @property
    def price_sql(self) -> tuple[str, list[object]]:
        """Points of a GPU-hour of a record, NULL if no price fits: SQL and its parameters."""
        if not self.prices:
            return "CAST(NULL AS DOUBLE)", []
        text, values = "CASE", list[object]()
        for price in self.prices:
            condition, given = price.condition
            text += f" WHEN {condition} THEN {price.of_gpu_hour!r}::DOUBLE"
            values += given
        return f"{text} END", values


def read_points(site: Path | None) -> PointsConfig:
    """The `points:` section; all defaults without a site file. Raises `ConfigError`, `MissingInputError`."""
    if site is None:
        return PointsConfig()
    return convert(read_site(site).get("points") or {}, PointsConfig, f"{site}: points")


def _start_of(day: str) -> float:
    try:
        return datetime.strptime(day, "%Y-%m-%d").timestamp()
    except ValueError:
        raise ConfigError(f"points.prices: {day!r} is no day, for example '2026-04-01' (in quotes)") from None
