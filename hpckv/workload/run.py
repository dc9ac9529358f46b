"""One run in this process: check everything, load the model, answer what is left, leave an output that can be resumed.

torch is imported by `run_batch` only, after `drain.install()`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hpckv.engine.request import Answer
from hpckv.errors import (
    EXIT_DRAINED,
    EXIT_FAILED_REQUESTS,
    EXIT_OK,
    CannotWriteError,
    ConfigError,
)
from hpckv.schema import read_yaml, to_plain
from hpckv.usage.rates import best_rates, read_rates
from hpckv.workload.answers import bad_line_record, error_line, output_line
from hpckv.workload.drain import Drain
from hpckv.workload.forecast import forecast
from hpckv.workload.job_comment import NOTHING_LEFT, comment, leave_comment
from hpckv.workload.lines import BatchInput, BatchLine, read_batch
from hpckv.workload.outlook import decoding_of, seconds_of
from hpckv.workload.output import OutputFile, write_file
from hpckv.workload.plan import RunPlan, most_tokens_in_use, plan_run
from hpckv.workload.prepare import (
    RunOptions,
    Work,
    prepare,
    refuse_changed_requests,
    report_input,
    stop_at_bad_lines,
)
from hpckv.workload.progress import RunProgress
from hpckv.workload.provenance import provenance
from hpckv.workload.queue import open_parts
from hpckv.workload.routing import cut_subtrees
from hpckv.workload.run_lock import RunLock
from hpckv.workload.runfile import RunConfig
from hpckv.workload.starting import Starting
from hpckv.workload.starts import note_start
from hpckv.workload.summary import Summary, describe_store
from hpckv.workload.unrecorded import account_for_earlier_starts

if TYPE_CHECKING:
    from hpckv.comm import World
    from hpckv.engine.engine import Engine
    from hpckv.workload.replicas import Router

_log = logging.getLogger(__name__)


def run_batch(config: RunConfig, options: RunOptions, drain: Drain, world: World) -> int:
    """Run the whole file or what is left of it; returns the exit code. Raises `HpckvError` for what stops it.

    Rank 0 of the world does all of it; the others compute what it sends them.
    """
    if not world.is_router:
        follow(config, drain, world)
        return EXIT_OK
    starting = Starting()
    batch = read_batch(Path(config.input), config.sampling)
    report_input(batch, config.input, options)
    directory = _make_run_directory(Path(config.output))
    if options.joins:
        from hpckv.workload.joint import run_joined

        return run_joined(config, options, _make_engine(config, world), batch, directory, drain)
    lock = RunLock(directory)
    try:
        return _run_locked(config, options, drain, batch, directory, starting, world)
    finally:
        lock.release()


def _run_locked(
    config: RunConfig,
    options: RunOptions,
    drain: Drain,
    batch: BatchInput,
    directory: Path,
    starting: Starting,
    world: World,
) -> int:
    if open_parts(directory):
        raise ConfigError(f"{directory}: jobs have joined this run and not finished it; run it with --join")
    path = directory / "output.jsonl"
    output = OutputFile(path)
    if output.done:
        _refuse_another_run(directory, config)
        refuse_changed_requests(batch.lines, path, config.input)
        account_for_earlier_starts(directory)
    note_start(directory, len(batch.lines) + len(batch.bad))
    write_file(directory / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
    errors = [bad_line_record(bad) for bad in batch.bad]

    from hpckv.workload.replicas import Router

    starting.mark("imported")
    engine = _make_engine(config, world)
    router = Router(engine, world)
    left = [line for line in batch.lines if line.custom_id not in output.done]
    summary = Summary(len(batch.lines) - len(left))
    try:
        work, refused = prepare(left, engine.prompts, engine.limits.check)
        stop_at_bad_lines(refused, config.input, options)
        errors += [bad_line_record(bad) for bad in refused]
        _write_errors(directory, errors)
        plan = plan_run([w.prompt for w in work], config.cache.block_tokens)
        write_file(directory / "plan.json", json.dumps({**plan.summary, "lines": _planned_ids(plan, work)}, indent=1))
        _look_ahead(summary, engine, [work[number] for number in plan.order], config)
        if work and not drain.requested:
            starting.mark("checked")
            _start(router, work, plan, config)
            summary.loaded_s = starting.seconds
            starting.mark("loaded")
            write_file(directory / "provenance.json", json.dumps(provenance(config, engine), indent=2))
            with RunProgress(len(batch.lines), len(output.done), is_quiet=options.is_quiet) as progress:
                _answer(router, engine, [w.line for w in work], output, drain, progress, summary)
        else:
            router.stop()
        errors += summary.failed
        _write_errors(directory, errors)
    finally:
        try:
            output.close()  # answers first: a signal leaves little time
        finally:
            engine.close()
    router.close()
    summary.replicas = router.records
    summary.seconds, summary.process_s, summary.times = starting.seconds, starting.process_seconds, starting.record
    if engine.is_loaded:
        write_file(directory / "provenance.json", json.dumps(provenance(config, engine), indent=2))
    write_file(directory / "summary.json", json.dumps(summary.record(plan), indent=2))
    leave_comment(comment(summary) if work else NOTHING_LEFT)
    return _exit_code(config, options, batch, output, errors, summary)


def _look_ahead(summary: Summary, engine: Engine, work: Sequence[Work], config: RunConfig) -> None:
    """What the plan expects of this start, to be set beside what it was."""
    nearest = engine.store.nearest if engine.store else None
    prompts, size = [w.prompt for w in work], config.cache.block_tokens
    expected = summary.expected = forecast(prompts, size, nearest, reuses=config.cache.reuse)
    known, model = read_rates(Path(config.site) if config.site else None), Path(config.model.path).resolve().name
    ranks = config.parallel.tp * config.parallel.pp
    if rates := best_rates(known, engine.rank.capability.label, model, ranks):
        load_bytes = expected.loaded_blocks * engine.pages.whole.block_bytes
        summary.expected_s = round(seconds_of(rates, expected, decoding_of(work, config), config, load_bytes), 3)


def follow(config: RunConfig, drain: Drain, world: World) -> None:
    """Another rank than the first: until rank 0 says that all is done."""
    from hpckv.engine.executor import serve
    from hpckv.engine.rank import Rank
    from hpckv.workload.replicas import answer_for_router

    drain.tell(world.lifeline.ask_for_drain)
    if world.is_root:
        answer_for_router(_make_engine(config, world), world)
        return
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


def _make_engine(config: RunConfig, world: World) -> Engine:
    from hpckv.engine.engine import Engine

    return Engine(
        config.model,
        store=config.store,
        cache=config.cache,
        engine=config.engine,
        parallel=config.parallel,
        world=world,
        run_directory=Path(config.output),
    )


def _start(router: Router, work: Sequence[Work], plan: RunPlan, config: RunConfig) -> None:
    """Cut the plan, and have every replica load the model."""
    prompts, block_tokens = [w.prompt for w in work], config.cache.block_tokens
    outputs = [w.line.params.max_tokens * w.line.params.n for w in work]
    place = {number: order for order, number in enumerate(plan.order)}
    requests = [replace(w.request, order=place[number]) for number, w in enumerate(work)]
    subtrees = cut_subtrees(prompts, plan.order, outputs, block_tokens, config.parallel.replicas)
    router.start(requests, subtrees, [w.line.session for w in work], most_tokens_in_use(prompts, outputs, block_tokens))


def _answer(
    router: Router,
    engine: Engine,
    lines: Sequence[BatchLine],
    output: OutputFile,
    drain: Drain,
    progress: RunProgress,
    summary: Summary,
) -> None:
    """The loop: steps until nothing is left or a drain is asked for."""
    line_of = {line.custom_id: line for line in lines}
    model = Path(engine.settings.path).name
    begun = time.monotonic()

    def take(answers: Sequence[Answer]) -> None:
        for answer in answers:
            if summary.answered == 0:
                summary.first_answer_s = time.monotonic() - begun
            line = line_of[answer.request_id]
            if answer.error:
                summary.failed.append(error_line(line.number, line.custom_id, "request_failed", answer.error))
                continue
            output.append(output_line(line, answer, model, engine.tokenizer))
            summary.add(answer)
            progress.answered(answer.usage.prompt_tokens, answer.usage.cached_tokens, answer.usage.completion_tokens)

    while router.num_unanswered and not (drain.requested or engine.rank.world.lifeline.wants_drain):
        take(router.step())
    take(router.stop())
    summary.answering_s = time.monotonic() - begun


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


def _planned_ids(plan: RunPlan, work: Sequence[Work]) -> list[str]:
    return [work[number].line.custom_id for number in plan.order]


def _exit_code(
    config: RunConfig,
    options: RunOptions,
    batch: BatchInput,
    output: OutputFile,
    errors: Sequence[dict[str, Any]],
    summary: Summary,
) -> int:
    left = sum(line.custom_id not in output.done for line in batch.lines) - (len(errors) - len(batch.bad))
    if left:
        _log.warning("stopped with %d requests left; the same command goes on from here", left)
        return EXIT_DRAINED
    _log.info("%s", summary.line(config.output))
    for line in filter(None, [summary.beside_the_plan, *describe_store(summary.replicas)]):
        _log.info("%s", line)
    if errors and not options.allows_errors:
        _log.warning("%d requests failed, see %s", len(errors), Path(config.output) / "errors.jsonl")
        return EXIT_FAILED_REQUESTS
    return EXIT_OK
