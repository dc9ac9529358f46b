"""How fast a kind of GPU computes a model: from the site file, else from what the ledger says of earlier runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from hpckv.device.gpus import is_kind
from hpckv.errors import ConfigError
from hpckv.schema import Config, convert, read_site

LEDGER_DAYS = 90
_LEAST_TOKENS = 500
"""What a ledger knows of fewer tokens tells no rate."""


class Rates(Config, frozen=True):
    """One kind of GPU and one model, as measured there (`rates:` in the site file)."""

    gpu: str
    """Its name as in provenance.json, or a part of it, for example H100; `cpu` for processors."""
    prefill_tokens_per_s: float
    """Prompt tokens a second of one replica, without what `attended_tokens_per_s` counts."""
    decode_tokens_per_s: float
    """Answer tokens a second of one replica with many sequences at once, without what the other rates of decode count."""
    model: str | None = None
    """Name of the model's folder; any model unless given."""
    num_gpus: int = 1
    """Of the replica that was measured."""
    decode_step_s: float = 0.0
    """What a decode step takes however many sequences it has."""
    attended_tokens_per_s: float | None = None
    """Pairs a second of a prompt token that is computed and one before it: attention, which grows with the square of a length."""
    decode_attended_tokens_per_s: float | None = None
    """Pairs a second of a token of an answer and one before it: contexts, which decode steps read again and again."""
    start_s: float = 0.0
    """From the start of the process until the weights are loaded; in a ledger from when it makes its engine."""
    load_bytes_per_s: float | None = None
    """At which stored blocks arrive at one rank."""
    date: str | None = None
    """When it was measured, YYYY-MM-DD."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if name.endswith("_per_s") and (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"rates: {name}: {value} is not above 0")
        if self.num_gpus < 1 or self.decode_step_s < 0 or self.start_s < 0:
            raise ConfigError("rates: num_gpus is at least 1, decode_step_s and start_s at least 0")

    def is_of(self, gpu: str, model: str) -> bool:
        """Whether it holds for them; of two names of a GPU one may say less than the other."""
        return (is_kind(self.gpu, gpu) or is_kind(gpu, self.gpu)) and self.model in (None, model)


def best_rates(known: Sequence[Rates], gpu: str, model: str, num_gpus: int) -> Rates | None:
    """Of those that hold: the model's own before any model's, a replica of this size before others, the earlier in the list."""
    fitting = [rates for rates in known if rates.is_of(gpu, model)]
    return min(fitting, key=lambda rates: (rates.model is None, rates.num_gpus != num_gpus), default=None)


def read_rates(site: Path | None) -> list[Rates]:
    """The `rates:` section; empty without a site file. Raises `ConfigError`, `MissingInputError`."""
    if site is None:
        return []
    return convert(read_site(site).get("rates") or [], list[Rates], f"{site}: rates")


def ledger_rates(store: Path, model: str, now: float | None = None) -> list[Rates]:
    """What runs of this model over this store reached in the last `LEDGER_DAYS`, one for each kind of GPU and size of replica."""
    from hpckv.usage.columns import COLUMNS, Column
    from hpckv.usage.gather import gather
    from hpckv.usage.points import PointsConfig
    from hpckv.usage.query import Accounts, Question

    end = time.time() if now is None else now
    start = end - LEDGER_DAYS * 86400
    found = gather([store], [], start, end)
    names = ("gpu", "ngpus", "computed", "prefill", "outtok", "decode")
    loading = "median(t1 - t0) FILTER (seq = 0)"
    start_s = Column("Start_s", "elapsed", loading, "of a writer's first record, which ends when its model is loaded")
    asked = Question(start, end + 1, group="replica", columns=[*(COLUMNS[n] for n in names), start_s], models=[model])
    return list(_rates(Accounts(found, PointsConfig(), str).ask(asked).rows, model))


def _rates(rows: Sequence[Sequence[object]], model: str) -> list[Rates]:
    rates = []
    for gpu, num_gpus, computed, prefill_s, output, decode_s, start_s in rows:
        assert isinstance(computed, int)
        assert isinstance(output, int)
        assert isinstance(prefill_s, float)
        assert isinstance(decode_s, float)
        assert isinstance(start_s, float | None)
        if min(computed, output) >= _LEAST_TOKENS and min(prefill_s, decode_s) > 0:
            rates.append(
                Rates(
                    gpu=str(gpu),
                    model=model,
                    num_gpus=int(str(num_gpus)),
                    prefill_tokens_per_s=computed / prefill_s,
                    decode_tokens_per_s=output / decode_s,
                    start_s=start_s or 0.0,
                )
            )
    return rates
