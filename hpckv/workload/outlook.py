"""A run before it is submitted: its tokens, what the store has of them, and what it will take on each kind of GPU. No torch."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from hpckv.device import Capability, choose_dtype
from hpckv.device.capability import DTYPES, processor
from hpckv.device.gpus import GPU_CLASSES, GpuClass, gpu_class, is_kind
from hpckv.engine.limits import Limits
from hpckv.engine.prompts import PromptReader
from hpckv.engine.sizing import build_namespace, digest_weights
from hpckv.errors import AccessError, CapabilityError, ConfigError
from hpckv.model import ModelConfig, read_config
from hpckv.quantity import ByteSize
from hpckv.store import BlockGeometry, TieredStore, open_store
from hpckv.store.root import StoreRoot
from hpckv.usage.points import PointsConfig, read_points
from hpckv.usage.rates import Rates, best_rates, ledger_rates, read_rates
from hpckv.workload.forecast import Decoding, Forecast, decode_steps, decoding, forecast
from hpckv.workload.lines import BatchLine, read_batch
from hpckv.workload.output import ids_in
from hpckv.workload.plan import plan_run
from hpckv.workload.prepare import RunOptions, Work, prepare, report_input, stop_at_bad_lines
from hpckv.workload.queue import open_parts
from hpckv.workload.runfile import RunConfig, SlurmConfig

_REACHED = 0.4
"""Of a data sheet's matrix products, by prefill; and of the memory a model leaves, by pages."""
_LAYER_S = 0.0007
"""That a layer adds to a decode step, whatever its size: starting its kernels."""
_PROCESS_S = 15.0
"""Until a process makes its engine: the container, Python, its libraries, and meeting the other ranks."""
_READ_BYTES_PER_S = 1e9
"""At which each rank reads its part of the weights, all at the same time."""
_SCALING = 0.8
"""What a second GPU adds to a replica, where that was not measured."""
_SPARE = 1.3
"""Time to ask for, beside the time that is expected."""
_STEP_S = 300.0
_WEIGHTS = 1.2
"""A loaded model takes its weights and about a fifth more."""


@dataclass(frozen=True)
class Kind:
    """A kind of GPU, and how fast it computes this model."""

    gpu: str
    source: str
    """Where the rates are from: `site`, `ledger`, or `estimated`."""
    rates: Rates


@dataclass(frozen=True)
class Cost:
    """What the run takes on one kind of GPU."""

    kind: Kind
    dtype: str
    forecast: Forecast
    num_gpus: int
    seconds: float
    """From the start of the job's processes to the last answer."""
    points: float | None
    """None where the site file has no price."""
    growth_bytes: int
    """That the store will grow by, at most."""

    @property
    def time(self) -> str:
        """For `sbatch --time`."""
        minutes = max(1, math.ceil(self.seconds * _SPARE / _STEP_S)) * int(_STEP_S / 60)
        return f"{minutes // 60:02d}:{minutes % 60:02d}:00"

    @property
    def record(self) -> dict[str, Any]:
        return {
            "gpu": self.kind.gpu,
            "rates": self.kind.source,
            "dtype": self.dtype,
            **self.forecast.record,
            "num_gpus": self.num_gpus,
            "seconds": round(self.seconds, 1),
            "gpu_seconds": round(self.seconds * self.num_gpus, 1),
            "time": self.time,
            "points": None if self.points is None else round(self.points, 4),
            "store_growth_bytes": self.growth_bytes,
        }


@dataclass
class Outlook:
    """The whole of it."""

    requests: int
    answered: int
    """Lines that the run directory has an answer for already."""
    bad_lines: int
    prompt_tokens: int = 0
    distinct_tokens: int = 0
    """What must be computed of the prompts with an empty store."""
    output_tokens: int = 0
    """Of all answers, at most or as expected."""
    costs: list[Cost] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)
    """Kinds of GPU that the run does not fit, and why."""
    max_points: float | None = None

    @property
    def beyond_budget(self) -> list[str]:
        """Kinds of GPU that cost more than `slurm.max_points`."""
        most = math.inf if self.max_points is None else self.max_points
        return [cost.kind.gpu for cost in self.costs if cost.points is not None and cost.points > most]

    @property
    def is_beyond_budget(self) -> bool:
        """Whether every kind of GPU that has a price is."""
        beyond = self.beyond_budget
        return bool(beyond) and len(beyond) == sum(cost.points is not None for cost in self.costs)

    @property
    def record(self) -> dict[str, Any]:
        names = ("requests", "answered", "bad_lines", "prompt_tokens", "distinct_tokens", "output_tokens", "max_points")
        plain = {name: getattr(self, name) for name in names}
        return {**plain, "gpus": [cost.record for cost in self.costs], "unfit": self.unfit}


Stepping = Callable[[Sequence[BatchLine]], Iterable[BatchLine]]


def look_ahead(
    config: RunConfig,
    options: RunOptions,
    *,
    gpus: Sequence[str] = (),
    output_tokens: int | None = None,
    stepping: Stepping = iter,
) -> Outlook:
    """Plan what is left of a run. `gpus` are kinds to look at instead of those that the run file asks Slurm for, or, where it names
    none, that site file and ledger know.

    `output_tokens` is how long an answer is expected to be, where `max_tokens` says only the most. `stepping` hears of each line
    that is read. Raises `HpckvError`.
    """
    batch = read_batch(Path(config.input), config.sampling)
    report_input(batch, config.input, options)
    directory = Path(config.output)
    done = set[str]().union(*map(ids_in, [directory / "output.jsonl", *open_parts(directory)]))
    model = read_config(Path(config.model.path))
    site = Path(config.site) if config.site else None
    points = read_points(site)
    left = [line for line in batch.lines if line.custom_id not in done]
    found = Outlook(len(batch.lines), len(batch.lines) - len(left), len(batch.bad))
    found.max_points = config.slurm.max_points if config.slurm else None
    # Kinds that find the same blocks in a store.
    alike: dict[tuple[str, str], list[Kind]] = {}
    for kind in _kinds(config, model, site, gpus):
        try:
            dtype = _dtype(config, model, kind.gpu)
        except CapabilityError as error:
            found.unfit[kind.gpu] = str(error)
        else:
            alike.setdefault((dtype, kind.gpu if config.engine.numerics == "strict" else ""), []).append(kind)
    work: list[Work] | None = None if alike else _read(config, model, options, left, None, stepping, found)
    for (dtype, _), kinds in alike.items():
        with _store(config, model, dtype, kinds[0].gpu) as store:
            if work is None:  # keys are the same in every dtype
                work = _read(config, model, options, left, store, stepping, found)
            size, nearest = config.cache.block_tokens, store.nearest if store else None
            expected = forecast([w.prompt for w in work], size, nearest, reuses=config.cache.reuse)
        answers = decoding_of(work, config, output_tokens)
        found.costs += [_cost(config, model, kind, dtype, expected, work, answers, points) for kind in kinds]
    found.output_tokens = sum(_output_lengths(work or [], output_tokens))
    return found


def _output_lengths(work: Sequence[Work], expected: int | None) -> list[int]:
    """Tokens of every sequence."""
    params = [w.line.params for w in work]
    return [min(expected or one.max_tokens, one.max_tokens) for one in params for _ in range(one.n)]


def decoding_of(work: Sequence[Work], config: RunConfig, expected: int | None = None) -> Decoding:
    """Answers of `max_tokens`, or of `expected` tokens where that is less."""
    prompts = [w.prompt for w in work for _ in range(w.line.params.n)]
    num_sharing = config.engine.max_requests if config.engine.share_prefix_attention else 1
    return decoding(prompts, _output_lengths(work, expected), config.cache.block_tokens, num_sharing)


def _read(
    config: RunConfig,
    model: ModelConfig,
    options: RunOptions,
    lines: Sequence[BatchLine],
    store: TieredStore | None,
    stepping: Stepping,
    found: Outlook,
) -> list[Work]:
    """Every line's tokens and keys, in the plan's order."""
    own = {"epoch_key": store.epoch_key, "identity": store.identity} if store else {}
    reader = PromptReader(Path(config.model.path), config.cache.block_tokens, **own)
    limits = Limits(model.max_positions, model.vocab_size, 0, has_tokenizer=reader.tokenizer is not None)
    work, refused = prepare(stepping(lines), reader, limits.check_prompt)
    stop_at_bad_lines(refused, config.input, options)
    found.bad_lines += len(refused)
    plan = plan_run([w.prompt for w in work], config.cache.block_tokens)
    found.prompt_tokens, found.distinct_tokens = plan.prompt_tokens, plan.least_prefill_tokens
    return [work[number] for number in plan.order]


def _kinds(config: RunConfig, model: ModelConfig, site: Path | None, gpus: Sequence[str]) -> Iterator[Kind]:
    """The kinds of GPU to look at, each with the best rates there are."""
    name = Path(config.model.path).resolve().name
    ranks = config.parallel.tp * config.parallel.pp
    known = {"site": [rates for rates in read_rates(site) if rates.model in (None, name)], "ledger": []}
    if config.store and StoreRoot.exists(Path(config.store.shared)):
        try:
            known["ledger"] = ledger_rates(Path(config.store.shared), name)
        except OSError as error:
            raise AccessError(f"store {config.store.shared}: {error.strerror}") from None
    rated: list[str] = []
    for rates in (*known["site"], *known["ledger"]):
        if not any(rates.is_of(gpu, name) for gpu in rated):  # else it is there by another name
            rated.append(rates.gpu)
    sheets = [gpu.name for gpu in GPU_CLASSES]
    for gpu in gpus or _asked_for(config.slurm or SlurmConfig(), rated, sheets) or rated or sheets:
        for source, measured in known.items():
            if best := best_rates(measured, gpu, name, ranks):
                yield Kind(gpu, source, best)
                break
        else:
            if (sheet := gpu_class(gpu)) is None:
                names = ", ".join(kind.name for kind in GPU_CLASSES)
                raise ConfigError(
                    f"--gpu {gpu}: no rates and no data sheet of it; known: {names}, and what the site file's rates: name "
                    "(hpckv bench load measures them)"
                )
            yield Kind(gpu, "estimated", _estimated(sheet, model, ranks))


def _asked_for(slurm: SlurmConfig, rated: Sequence[str], sheets: Sequence[str]) -> list[str]:
    """Kinds that the run file names to Slurm, each as rates call it, else data sheets; empty if these have none of them."""
    found: dict[str, None] = {}
    words = f"{slurm.gpus_per_node} {slurm.gres} {slurm.constraint}"
    for word in re.findall(r"\b[a-zA-Z][\w-]*", words):  # what begins with a digit is how many, or how much memory
        # Of two names one may say less than the other: a100, A100 80GB, nvidia_a100-sxm4-80gb.
        named = ([gpu for gpu in known if is_kind(word, gpu) or is_kind(gpu, word)] for known in (rated, sheets))
        found |= dict.fromkeys(next(filter(None, named), ()))
    return list(found)


def _estimated(gpu: GpuClass, model: ModelConfig, ranks: int) -> Rates:
    """By the data sheet, for a replica of one GPU or several."""
    prefill = _REACHED * gpu.tflops * 1e12 * ranks / (2 * model.num_parameters)
    bandwidth = gpu.bandwidth_gb_s * 1e9 * ranks
    weights_s = 2 * model.num_parameters / bandwidth
    stored_bytes = model.num_parameters * DTYPES.get(model.stored_dtype, DTYPES["float32"])
    return Rates(
        gpu=gpu.name,
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=prefill / 2,
        num_gpus=ranks,
        decode_step_s=weights_s + _LAYER_S * model.num_layers,
        decode_attended_tokens_per_s=_REACHED * bandwidth / (2 * model.kv_values_per_token),
        start_s=_PROCESS_S + stored_bytes / ranks / _READ_BYTES_PER_S,
    )


def _device(gpu: str) -> Capability:
    """A kind of GPU as its data sheet says, one without as any of these years; or this machine's processor."""
    if is_kind("cpu", gpu):
        return processor()
    sheet = gpu_class(gpu)
    if sheet is None:
        return Capability("cuda", gpu, (9, 0))
    return Capability("cuda", sheet.name, sheet.compute, int(sheet.memory_gb * 1e9))


def _dtype(config: RunConfig, model: ModelConfig, gpu: str) -> str:
    """What it computes in; raises `CapabilityError` if it cannot, or has no room for the model."""
    dtype = choose_dtype(config.model.dtype, model.stored_dtype, _device(gpu))
    if sheet := gpu_class(gpu):
        needed = model.num_parameters * DTYPES[dtype] * _WEIGHTS / (config.parallel.tp * config.parallel.pp)
        if needed > sheet.memory_gb * 1e9:
            raise CapabilityError(
                f"{needed / 1e9:.0f} GB for the model do not fit {sheet.memory_gb:g} GB; raise parallel.tp or parallel.pp"
            )
    return dtype


@contextmanager
def _store(config: RunConfig, model: ModelConfig, dtype: str, gpu: str) -> Iterator[TieredStore | None]:
    """What is stored now in this dtype, or can be converted to it; None without a store."""
    if not config.store or not config.store.read or not StoreRoot.exists(Path(config.store.shared)):
        yield None
        return
    device = _device(gpu)
    digest = digest_weights(Path(config.model.path))
    namespace = build_namespace(digest, model, config.cache, config.engine, device, dtype, config.parallel.tp)
    item = DTYPES[dtype]
    geometry = BlockGeometry(model.num_kv_heads, model.num_layers, config.cache.block_tokens, model.head_dim, item)
    changes = {"write": "off", "local": "none", "host_size": ByteSize(0), "audit": 0.0}
    only_reading = msgspec.structs.replace(config.store, **changes)
    store = open_store(only_reading, namespace, geometry)
    try:
        yield store
    finally:
        store.close()


def _cost(
    config: RunConfig,
    model: ModelConfig,
    kind: Kind,
    dtype: str,
    expected: Forecast,
    work: Sequence[Work],
    answers: Decoding,
    points: PointsConfig,
) -> Cost:
    size, ranks = config.cache.block_tokens, config.parallel.num_ranks
    block_bytes = size * model.kv_values_per_token * DTYPES[dtype]
    seconds = seconds_of(kind.rates, expected, answers, config, expected.loaded_blocks * block_bytes)
    kept = 0
    if config.store and config.store.write == "all":
        of_answers = (_answer_blocks(w, size) for w in work)
        kept = expected.new_blocks + sum(of_answers)
    elif config.store and config.store.write == "planned":
        kept = expected.new_shared_blocks
    paid = _points(config, kind.gpu, seconds, points)
    return Cost(kind, dtype, expected, ranks, seconds, paid, kept * block_bytes)


def _points(config: RunConfig, gpu: str, seconds: float, points: PointsConfig) -> float | None:
    """By the site file's prices, else by what a node costs; None where neither is known."""
    slurm = config.slurm or SlurmConfig()
    price = points.of_gpu_hour(slurm.partition, slurm.qos, gpu, time.time() + seconds)
    if price is not None:
        return seconds / 3600 * config.parallel.num_ranks * price
    if slurm.points_per_node_hour is not None:
        return seconds / 3600 * slurm.nodes * slurm.points_per_node_hour
    return None


def _answer_blocks(work: Work, size: int) -> int:
    """Full blocks that its answers add at most."""
    prompt, params = len(work.prompt.token_ids), work.line.params
    return params.n * ((prompt + params.max_tokens - 1) // size - prompt // size)


def seconds_of(rates: Rates, expected: Forecast, answers: Decoding, config: RunConfig, load_bytes: int) -> float:
    """From the start of the processes to the last answer."""
    parallel = config.parallel
    ranks, replicas = parallel.tp * parallel.pp, parallel.replicas
    speed = ranks / rates.num_gpus
    speed = 1 + (speed - 1) * _SCALING if speed > 1 else speed
    prefill_s = expected.computed_tokens / rates.prefill_tokens_per_s
    if rates.attended_tokens_per_s:
        prefill_s += expected.attended_tokens / rates.attended_tokens_per_s
    prefill_s /= speed * replicas
    decode_s = sum(answers.output_tokens) / rates.decode_tokens_per_s
    if rates.decode_attended_tokens_per_s:
        decode_s += answers.attended_tokens / rates.decode_attended_tokens_per_s
    decode_s /= speed * replicas
    decode_s += decode_steps(answers.output_tokens, config.engine.max_requests * replicas) * rates.decode_step_s
    load_s = load_bytes / (rates.load_bytes_per_s * ranks * replicas) if rates.load_bytes_per_s else 0.0
    return rates.start_s + prefill_s + decode_s + load_s
