"""One job's part in a run that several jobs work on: take items from the queue, answer them, give the run back whole.

torch is imported by `run_joined` only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hpckv.engine.request import Answer, Request
from hpckv.errors import EXIT_DRAINED, EXIT_FAILED_REQUESTS, EXIT_OK, CannotWriteError, CapabilityError, ConfigError
from hpckv.quantity import format_count
from hpckv.schema import to_plain
from hpckv.workload.answers import bad_line_record, error_line, output_line
from hpckv.workload.drain import Drain
from hpckv.workload.heart import Heart
from hpckv.workload.job_comment import NOTHING_LEFT, comment, leave_comment
from hpckv.workload.lines import BatchInput, BatchLine
from hpckv.workload.merge import add_up, merge_parts, run_digest
from hpckv.workload.output import OutputFile, ids_in, write_file
from hpckv.workload.plan import most_tokens_in_use, plan_run
from hpckv.workload.prepare import RunOptions, prepare, refuse_changed_requests, stop_at_bad_lines
from hpckv.workload.progress import RunProgress
from hpckv.workload.provenance import provenance
from hpckv.workload.queue import MERGE, Item, QueuePlan, View, Worker, WorkQueue, newest_round
from hpckv.workload.routing import cut_subtrees, num_common
from hpckv.workload.run_lock import RunLock
from hpckv.workload.runfile import RunConfig
from hpckv.workload.share import Share
from hpckv.workload.starting import Starting
from hpckv.workload.starts import note_start
from hpckv.workload.summary import Summary, engine_record
from hpckv.workload.unrecorded import account_for_lost_worker

if TYPE_CHECKING:
    from hpckv.engine.engine import Engine

_log = logging.getLogger(__name__)

_LOOKS = 30
"""A lease: so often the queue is looked at."""
_NAP_S = 0.005
_KEEP_ALIVE_S = 30.0
_QUEUED_BATCHES = 2
"""Items are taken until so many times `engine.max_requests` are here: enough to always fill a batch and to read ahead."""


def run_joined(
    config: RunConfig, options: RunOptions, engine: Engine, batch: BatchInput, directory: Path, drain: Drain
) -> int:
    """Work on the run with whoever else does; returns the exit code. Raises `HpckvError` for what stops it.

    `engine` is checked and not loaded, and closed by this.
    """
    if engine.rank.world.num_replicas > 1:
        raise ConfigError("parallel.replicas: replicas of one job and --join do not go together; start more jobs")
    lock = RunLock(directory, fcntl.LOCK_SH)
    try:
        with engine:
            return _JoinedRun(config, options, engine, batch, directory).run(drain)
    finally:
        lock.release()


class _JoinedRun:
    """This worker's state."""

    def __init__(
        self, config: RunConfig, options: RunOptions, engine: Engine, batch: BatchInput, directory: Path
    ) -> None:
        self._config, self._options, self._engine, self._directory = config, options, engine, directory
        self._lines = {line.custom_id: line for line in batch.lines}
        self._bad = [bad_line_record(bad) for bad in batch.bad]
        self._lease_s = config.queue.lease_s
        self._worker = Worker.of_this_process()
        self._queue = WorkQueue(newest_round(directory), self._worker, self._lease_s)
        self._plan = self._queue.plan or QueuePlan("", 0, [])
        self._share = Share(self._queue, engine, self._start)
        self._place: dict[str, int] = {}
        self._summary, self._starting = Summary(0), Starting()

    def run(self, drain: Drain) -> int:
        """Until the round is over, or a drain is asked for."""
        done = ids_in(self._directory / "output.jsonl")
        refuse_changed_requests(list(self._lines.values()), self._directory / "output.jsonl", self._config.input)
        self._summary.already = len(done)
        left = [line for name, line in self._lines.items() if name not in done]
        if not left:
            _log.info("all %d answers are there", len(done))
            leave_comment(NOTHING_LEFT)
            return EXIT_OK
        if self._is_finished_by_the_same_array:
            _log.info("the other tasks of this array have finished the run; what failed is tried again by the next job")
            leave_comment(NOTHING_LEFT)
            return self._exit_code
        self._plan = self._agree_on_plan(left)
        self._place = {name: place for place, name in enumerate(self._plan.ids)}
        self._worker.tokens = self._engine.limits.held_tokens
        note_start(self._directory, len(self._lines) + len(self._bad), self._worker.name)
        started = time.monotonic()
        heart = Heart(self._queue, self._lease_s)
        try:
            if not drain.requested:
                if self._plan.items:  # else every line that is left was refused
                    self._engine.load(self._plan.max_tokens_in_use)
                    self._summary.loaded_s = time.monotonic() - started
                    self._starting.mark("loaded")
                    self._write_provenance()
                while not self._is_drained(drain):
                    self._answer(drain, heart)
                    if self._merge(drain, heart):
                        break
            is_drained = not self._queue.look().is_over
        finally:
            with contextlib.suppress(CannotWriteError):
                heart.stop()
        self._engine.close()
        self._summary.seconds = time.monotonic() - started
        self._write_summary()
        if is_drained:
            _log.warning("stopped with requests left; other jobs, or the same command, go on from here")
            return EXIT_DRAINED
        _log.info("%s", self._summary.line(str(self._directory)))
        return self._exit_code

    @property
    def _exit_code(self) -> int:
        """Of a run that is finished."""
        errors = self._directory / "errors.jsonl"
        has_failed = errors.exists() and errors.stat().st_size > 0
        return EXIT_FAILED_REQUESTS if has_failed and not self._options.allows_errors else EXIT_OK

    @property
    def _is_finished_by_the_same_array(self) -> bool:
        """Whether no round is under way, and tasks of this job's array were in the last one: a late one has nothing to add."""
        array, mark, _ = (self._worker.job or "").partition("_")
        number = int(self._queue.folder.name)
        if not mark or number == 1 or self._queue.plan:
            return False
        before = self._queue.folder.with_name(str(number - 1))
        return any((before / "workers").glob(f"{array}_*.json"))

    def _agree_on_plan(self, left: Sequence[BatchLine]) -> QueuePlan:
        """The round's plan, made here if nobody has made it; raises `ConfigError` if it is another run's."""
        digest = run_digest(self._config)
        plan = self._queue.plan or self._queue.publish_plan(self._make_plan(left, digest))
        if plan.digest != digest:
            raise ConfigError(
                f"{self._directory}: other jobs work there on another input, or with other model, sampling or seed; "
                "take another --output, or remove the folder"
            )
        return plan

    def _make_plan(self, left: Sequence[BatchLine], digest: str) -> QueuePlan:
        write_file(self._directory / "config.yaml", yaml.safe_dump(to_plain(self._config), sort_keys=False))
        engine, block_tokens = self._engine, self._config.cache.block_tokens
        # What is too long for this GPU may fit another's.
        work, refused = prepare(left, engine.prompts, engine.limits.check_prompt)
        stop_at_bad_lines(refused, self._config.input, self._options)
        prompts = [w.prompt for w in work]
        plan = plan_run(prompts, block_tokens)
        outputs = [w.line.params.max_tokens * w.line.params.n for w in work]
        # As many pieces as that many replicas would want, an eighth of a share each.
        subtrees = cut_subtrees(prompts, plan.order, outputs, block_tokens, max(2, self._config.queue.items // 8))
        items = [
            Item(
                f"{number:05d}",
                [work[n].line.custom_id for n in subtree.prompts],
                list(subtree.costs),
                max(engine.limits.tokens_of(work[n].request) for n in subtree.prompts),
                num_common(prompts[before.prompts[-1]].keys, prompts[subtree.prompts[0]].keys) if before else 0,
            )
            for number, (before, subtree) in enumerate(zip([None, *subtrees], subtrees, strict=False))
        ]
        ids = [work[n].line.custom_id for n in plan.order]
        write_file(self._directory / "plan.json", json.dumps({**plan.summary, "lines": ids}, indent=1))
        bad = [*self._bad, *map(bad_line_record, refused)]
        return QueuePlan(digest, most_tokens_in_use(prompts, outputs, block_tokens), items, bad)

    def _is_drained(self, drain: Drain) -> bool:
        return drain.requested or self._engine.rank.world.lifeline.wants_drain

    def _answer(self, drain: Drain, heart: Heart) -> None:
        """Steps until all items are done or a drain is asked for."""
        with self._unless_over():
            self._answer_into(OutputFile(self._queue.part), drain, heart)

    def _answer_into(self, part: OutputFile, drain: Drain, heart: Heart) -> None:
        awake = begun = time.monotonic()
        most = _QUEUED_BATCHES * self._engine.config.max_requests
        try:
            with RunProgress(len(self._lines), self._summary.already, is_quiet=self._options.is_quiet) as progress:
                view, looked = self._queue.look(), time.monotonic()
                while not self._is_drained(drain):
                    if not view.left or view.is_stale or time.monotonic() - looked > self._lease_s / _LOOKS:
                        view, looked = self._queue.look(), time.monotonic()
                        self._share.drop_what_others_do(view)
                        self._share.give(view)
                    if not view.left or view.is_over:
                        break
                    is_idle = not self._share.fill(view, most) and not self._engine.num_unfinished
                    heart.tick(is_idle=is_idle)
                    if is_idle:
                        self._refuse_what_nobody_can(view)
                        time.sleep(_NAP_S)
                        if time.monotonic() - awake > _KEEP_ALIVE_S:
                            self._engine.executor.wait_for_blocks(None)  # the other ranks wait for a step
                            awake = time.monotonic()
                        continue
                    awake = time.monotonic()
                    with self._unless_over():
                        self._take(self._engine.step(), part, progress, begun)
                        view.done |= self._share.finish(part.sync)
                self._engine.abort_all()
        finally:
            self._summary.answering_s = time.monotonic() - begun
            self._close(part)

    def _start(self, custom_id: str) -> None:
        line = self._lines[custom_id]
        ids = self._engine.prompts.ids_of(line.prompt)
        self._engine.add(Request(custom_id, ids, line.params, self._place[custom_id]))

    def _take(self, answers: Sequence[Answer], part: OutputFile, progress: RunProgress, begun: float) -> None:
        model, failures = Path(self._engine.settings.path).name, []
        for answer in answers:
            line = self._lines[answer.request_id]
            if not self._summary.answered:
                self._summary.first_answer_s = time.monotonic() - begun
            if answer.error:
                failures.append(error_line(line.number, line.custom_id, "request_failed", answer.error))
            else:
                part.append(output_line(line, answer, model, self._engine.tokenizer))
                self._summary.add(answer)
                usage = answer.usage
                progress.answered(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
            self._share.answered(answer.request_id)
            self._starting.mark("last_answer")
        if failures:
            self._summary.failed += failures
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self._summary.failed)
            write_file(self._queue.failures, text)

    def _refuse_what_nobody_can(self, view: View) -> None:
        """Raise `CapabilityError` if all that is left is too long for every worker there is."""
        most = max(worker.tokens for worker in view.alive.values())
        needs = [item.tokens for item in view.left if item.tokens > most]
        if needs and len(needs) == len(view.left):
            raise CapabilityError(
                f"{self._directory}: what is left holds up to {format_count(max(needs))} tokens at once, the GPUs that work on it "
                f"{format_count(most)}; let a job with more GPU memory join, or raise cache.device_memory"
            )

    def _close(self, part: OutputFile) -> None:
        with self._unless_over():
            part.close()

    @contextlib.contextmanager
    def _unless_over(self) -> Iterator[None]:
        """A part that cannot be written is no trouble once others have had the same answers, and all are merged."""
        try:
            yield
        except CannotWriteError:
            if not self._queue.look().is_over:
                raise

    def _merge(self, drain: Drain, heart: Heart) -> bool:
        """When all items are done, one worker brings all answers together and the others wait for it; whether that was done."""
        while not self._is_drained(drain):
            view = self._queue.look()
            heart.tick(is_idle=False)
            if view.left or view.is_over:
                return view.is_over
            is_own = view.claims.get(MERGE, (0, ""))[1] == self._worker.name
            if is_own or (view.is_free(MERGE) and self._queue.claim(MERGE, view)):
                for part in self._queue.parts:
                    if part.stem not in view.alive:
                        account_for_lost_worker(self._directory, part)
                lost = merge_parts(self._directory, self._queue)
                if lost:
                    _log.error("%d answers are in no part although they were written: computed again", len(lost))
                    self._queue.give_again(lost)
                return not lost
            time.sleep(self._lease_s / _LOOKS)
        return False

    def _write_provenance(self) -> None:
        text = json.dumps(provenance(self._config, self._engine), indent=2)
        write_file(self._directory / "logs" / f"provenance-{self._worker.name}.json", text)
        write_file(self._directory / "provenance.json", text)

    def _write_summary(self) -> None:
        """This worker's, and the sum of all that there are: the last to end leaves the whole."""
        own = {**self._summary.sums, "times": self._starting.record, **engine_record(self._engine)}
        path = self._queue.folder / "workers" / f"{self._worker.name}.summary.json"
        write_file(path, json.dumps(own, indent=2))

        def everybodys() -> dict[str, dict[str, Any]]:
            paths = sorted(self._directory.glob("queue/*/workers/*.summary.json"))  # of all rounds
            return {path.name: json.loads(path.read_bytes()) for path in paths}

        written: dict[str, dict[str, Any]] = {}
        while (records := everybodys()) != written:  # else one that ended meanwhile would be overwritten
            here = {name for name in records if (path.parent / name).exists()}
            write_file(self._directory / "summary.json", json.dumps(add_up(records, here), indent=2))
            written = records
        self._summary.replicas = [own]
        leave_comment(comment(self._summary))
