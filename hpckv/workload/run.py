"""One run in this process: check everything, load the model, answer what is left, leave an output that can be resumed.

torch is imported by `run_batch` only, after `drain.install()`.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hpckv.engine.request import Answer, Request
from hpckv.errors import (
    EXIT_DRAINED,
    EXIT_FAILED_REQUESTS,
    EXIT_OK,
    CannotWriteError,
    CapacityError,
    ConfigError,
    InputError,
)
from hpckv.schema import read_yaml, to_plain
from hpckv.workload.answers import bad_line_record, error_line, output_line
from hpckv.workload.drain import Drain
from hpckv.workload.lines import BadLine, BatchInput, BatchLine, read_batch
from hpckv.workload.output import OutputFile, RunLock, write_file
from hpckv.workload.plan import PlannedPrompt, RunPlan, most_tokens_in_use, plan_run
from hpckv.workload.progress import RunProgress
from hpckv.workload.provenance import provenance
from hpckv.workload.runfile import RunConfig
from hpckv.workload.store_report import describe_store

if TYPE_CHECKING:
    from hpckv.comm import World
    from hpckv.engine.engine import Engine

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """What flags say beside the run file."""

    skips_bad_lines: bool = False
    allows_errors: bool = False
    is_quiet: bool = False


@dataclass(frozen=True)
class _Work:
    """A line that is ready to run."""

    line: BatchLine
    prompt: PlannedPrompt


def run_batch(config: RunConfig, options: RunOptions, drain: Drain, world: World) -> int:
    """Run the whole file or what is left of it; returns the exit code. Raises `HpckvError` for what stops it.

    Rank 0 of the world does all of it; the others compute what it sends them.
    """
    if not world.is_root:
        follow(config, drain, world)
        return EXIT_OK
    started = time.monotonic()
    batch = read_batch(Path(config.input), config.sampling)
    _report_input(batch, config.input, options)
    directory = _make_run_directory(Path(config.output))
    lock = RunLock(directory)
    try:
        return _run_locked(config, options, drain, batch, directory, started, world)
    finally:
        lock.release()


def _run_locked(
    config: RunConfig,
    options: RunOptions,
    drain: Drain,
    batch: BatchInput,
    directory: Path,
    started: float,
    world: World,
) -> int:
    output = OutputFile(directory / "output.jsonl")
    if output.done:
        _refuse_another_run(directory, config)
    write_file(directory / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
    errors = [bad_line_record(bad) for bad in batch.bad]

    from hpckv.engine.engine import Engine

    engine = Engine(
        config.model,
        store=config.store,
        cache=config.cache,
        engine=config.engine,
        parallel=config.parallel,
        world=world,
    )
    try:
        left = [line for line in batch.lines if line.custom_id not in output.done]
        work, refused = _prepare(left, engine)
        _stop_at_bad_lines(refused, config.input, options)
        errors += [bad_line_record(bad) for bad in refused]
        _write_errors(directory, errors)
        plan = plan_run([w.prompt for w in work], config.cache.block_tokens)
        write_file(directory / "plan.json", json.dumps({**plan.summary, "lines": _planned_ids(plan, work)}, indent=1))
        summary = _Summary(len(batch.lines) - len(left))
        if work and not drain.requested:
            outputs = [w.line.params.max_tokens * w.line.params.n for w in work]
            engine.load(most_tokens_in_use([w.prompt for w in work], outputs, config.cache.block_tokens))
            summary.loaded_s = time.monotonic() - started
            write_file(directory / "provenance.json", json.dumps(provenance(config, engine), indent=2))
            with RunProgress(len(batch.lines), len(output.done), is_quiet=options.is_quiet) as progress:
                _answer(engine, work, plan, output, drain, progress, summary)
        errors += summary.failed
        _write_errors(directory, errors)
    finally:
        try:
            output.close()  # answers first: a signal leaves little time
        finally:
            engine.close()
    summary.seconds = time.monotonic() - started
    if engine.is_loaded:
        write_file(directory / "provenance.json", json.dumps(provenance(config, engine), indent=2))
    write_file(directory / "summary.json", json.dumps(summary.record(engine, plan), indent=2))
    return _exit_code(config, options, batch, output, errors, summary, describe_store(engine))


def follow(config: RunConfig, drain: Drain, world: World) -> None:
    """Another rank than the first: until rank 0 says that all is done."""
    from hpckv.engine.executor import serve
    from hpckv.engine.rank import Rank

    drain.tell(world.lifeline.ask_for_drain)
    rank = Rank(
        config.model,
        store=config.store,
        cache=config.cache,
        engine=config.engine,
        parallel=config.parallel,
        world=world,
    )
    try:
        serve(rank)
    finally:
        rank.close()


def _answer(
    engine: Engine,
    work: Sequence[_Work],
    plan: RunPlan,
    output: OutputFile,
    drain: Drain,
    progress: RunProgress,
    summary: _Summary,
) -> None:
    """The loop: steps until nothing is left or a drain is asked for."""
    lines = {w.line.custom_id: w.line for w in work}
    for order, number in enumerate(plan.order):
        item = work[number]
        request = Request(item.line.custom_id, item.prompt.token_ids, item.line.params, order, item.prompt.keys)
        engine.add(request)
    model = Path(engine.settings.path).name
    begun = time.monotonic()
    while engine.num_unfinished:
        if drain.requested or engine.rank.world.lifeline.wants_drain:
            engine.abort_all()
            break
        for answer in engine.step():
            if summary.answered == 0:
                summary.first_answer_s = time.monotonic() - begun
            line = lines[answer.request_id]
            if answer.error:
                summary.failed.append(error_line(line.number, line.custom_id, "request_failed", answer.error))
                continue
            output.append(output_line(line, answer, model, engine.tokenizer))
            summary.add(answer)
            progress.answered(answer.usage.prompt_tokens, answer.usage.cached_tokens, answer.usage.completion_tokens)
    summary.answering_s = time.monotonic() - begun


def _prepare(lines: Sequence[BatchLine], engine: Engine) -> tuple[list[_Work], list[BadLine]]:
    """Token ids and block keys of every line, and the lines this model cannot take."""
    work, refused = [], []
    for line in lines:
        try:
            ids = engine.prompt_ids(line.prompt)
            engine.check(Request(line.custom_id, ids, line.params))
        except (InputError, CapacityError) as error:
            refused.append(BadLine(line.number, line.custom_id, str(error)))
            continue
        work.append(_Work(line, PlannedPrompt(ids, engine.keys_of(ids))))
    return work, refused


def _report_input(batch: BatchInput, name: str, options: RunOptions) -> None:
    for key, number in batch.unknown_keys.items():
        _log.warning("%s:%d: body key %r is not known and has no effect (said once)", name, number, key)
    _stop_at_bad_lines(batch.bad, name, options)


def _stop_at_bad_lines(bad: Sequence[BadLine], name: str, options: RunOptions) -> None:
    if not bad or options.skips_bad_lines:
        return
    for line in bad[1:5]:
        _log.error("%s:%d: %s", name, line.number, line.reason)
    more = f" ({len(bad)} bad lines in all; --skip-bad-lines answers the rest)" if len(bad) > 1 else ""
    raise InputError(f"{name}:{bad[0].number}: {bad[0].reason}{more}")


def _make_run_directory(directory: Path) -> Path:
    try:
        (directory / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWriteError(f"{directory}: {error.strerror}") from None
    return directory


def _refuse_another_run(directory: Path, config: RunConfig) -> None:
    """A resumed run must give the answers it would have given at once: raise `ConfigError` for what would change them."""
    before, now = directory / "config.yaml", to_plain(config)
    if not before.exists():
        return
    was = read_yaml(before)
    for name in ("model", "sampling", "engine.numerics", "engine.seed"):
        old: Any = was
        new: Any = now
        for part in name.split("."):
            old, new = (old or {}).get(part), (new or {}).get(part)
        if old != new:
            raise ConfigError(
                f"{directory}: holds answers of a run with another {name}; take another --output, or remove the folder"
            )


def _write_errors(directory: Path, errors: Sequence[dict[str, Any]]) -> None:
    path = directory / "errors.jsonl"
    if errors or path.exists():
        write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in errors))


def _planned_ids(plan: RunPlan, work: Sequence[_Work]) -> list[str]:
    return [work[number].line.custom_id for number in plan.order]


def _exit_code(
    config: RunConfig,
    options: RunOptions,
    batch: BatchInput,
    output: OutputFile,
    errors: Sequence[dict[str, Any]],
    summary: _Summary,
    store_lines: Sequence[str],
) -> int:
    left = sum(line.custom_id not in output.done for line in batch.lines) - (len(errors) - len(batch.bad))
    if left:
        _log.warning("stopped with %d requests left; the same command goes on from here", left)
        return EXIT_DRAINED
    _log.info("%s", summary.line(config.output))
    for line in store_lines:
        _log.info("%s", line)
    if errors and not options.allows_errors:
        _log.warning("%d requests failed, see %s", len(errors), Path(config.output) / "errors.jsonl")
        return EXIT_FAILED_REQUESTS
    return EXIT_OK


class _Summary:
    """Counters of this process's part of the run, for `summary.json` and the last line of the log."""

    def __init__(self, already: int) -> None:
        self.already = already
        self.answered = 0
        self.prompt_tokens = self.output_tokens = 0
        self.cached: Counter[str] = Counter()
        self.failed: list[dict[str, Any]] = []
        self.loaded_s = self.first_answer_s = self.answering_s = self.seconds = 0.0

    def add(self, answer: Answer) -> None:
        self.answered += 1
        self.prompt_tokens += answer.usage.prompt_tokens
        self.output_tokens += answer.usage.completion_tokens
        self.cached.update(answer.usage.cached)

    @property
    def cached_tokens(self) -> int:
        return sum(self.cached.values())

    @property
    def hit_percent(self) -> float:
        return 100 * self.cached_tokens / max(1, self.prompt_tokens)

    def line(self, output: str) -> str:
        return (
            f"{self.answered} answers ({self.already} were there) in {self.seconds:.1f} s; {self.prompt_tokens:,} prompt tokens, "
            f"{self.hit_percent:.1f} % from cache; {self.output_tokens:,} output tokens: {Path(output) / 'output.jsonl'}"
        )

    def record(self, engine: Engine, plan: RunPlan) -> dict[str, Any]:
        record: dict[str, Any] = {
            "requests": self.answered,
            "requests_before": self.already,
            "failed": len(self.failed),
            "prompt_tokens": self.prompt_tokens,
            "cached": dict(self.cached),
            "computed_tokens": self.prompt_tokens - self.cached_tokens,
            "output_tokens": self.output_tokens,
            "hit_percent": round(self.hit_percent, 2),
            "seconds": round(self.seconds, 3),
            "load_seconds": round(self.loaded_s, 3),
            "first_answer_seconds": round(self.first_answer_s, 3),
            "answering_seconds": round(self.answering_s, 3),
            "least_prefill_tokens": plan.least_prefill_tokens,
        }
        if engine.is_loaded:
            record["scheduler"] = engine.scheduler.stats.__dict__
            record["step_seconds"] = {k: round(v, 4) for k, v in engine.times.__dict__.items()}
            record["pages"] = {"total": engine.pages.num_usable, "evicted": engine.cache.pool.num_evicted}
        if engine.store:
            record["store"] = {tier.label: tier.stats.record for tier in engine.store.tiers}
            record["load_or_recompute"] = engine.load_policy.record
            record["bridged_blocks"] = engine.bridged_blocks
            record["audits"] = engine.store.auditor.record if engine.store.auditor else None
        return record
