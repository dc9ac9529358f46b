"""What an engine has done so far, in the ledger's terms, and the ledger file that says so. No torch."""

from __future__ import annotations

import grp
import logging
import os
import platform
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hpckv.errors import HpckvError
from hpckv.log import warn_once
from hpckv.store.fetch import within
from hpckv.store.root import StoreRoot
from hpckv.usage.energy import EnergyMeter, energy_meter
from hpckv.usage.ledger import LedgerFile, MakeFolder
from hpckv.usage.meter import Meter
from hpckv.usage.record import Counters, Record

if TYPE_CHECKING:
    from hpckv.engine.engine import Engine
    from hpckv.engine.request import Answer

_log = logging.getLogger(__name__)

_RUN_PATIENCE_S = 10.0
"""With a run directory, whose filesystem has the output too."""


class EngineMeter:
    """One replica's counters. Requests are counted when they are answered, so that a sum always agrees with the output."""

    def __init__(self, engine: Engine, run: Path | None) -> None:
        """`run` is the run directory, which names the run, and has its ledger if there is no store."""
        self._engine, self._run = engine, run
        self._answered = Counters()
        self._lock = threading.Lock()
        self._began, self._began_at = time.monotonic(), time.time()
        self._meter: Meter | None = None
        self._energy: EnergyMeter | None = None

    def start(self) -> None:
        """The model is loaded: write the first record, and go on by itself. Without store and run directory there is no ledger."""
        place = self._place()
        if place is not None:
            folder, make, project = place
            self._energy = self._make_energy_meter()
            file = LedgerFile(folder, self._pattern(project), make, now=self._began_at)
            self._meter = Meter(file, self.sample, patience_s=self._patience_s)
            if self._run:
                _note_ledger(self._run, file.path, is_kept=not self._meter.is_broken)

    def close(self) -> None:
        """The last record; idempotent."""
        if self._meter:
            self._meter.close()

    def count(self, answer: Answer, by_writer: Mapping[int, int]) -> None:
        """A request is over."""
        usage, more = answer.usage, Counters(failed=1)
        if not answer.error:
            more = Counters(
                requests=1,
                prompt_tokens=usage.prompt_tokens,
                cached=usage.cached,
                computed_tokens=usage.computed_tokens,
                output_tokens=usage.completion_tokens,
                by_writer={str(uid): tokens for uid, tokens in by_writer.items()},
            )
        with self._lock:
            self._answered += more

    def sample(self) -> Counters:
        """Everything so far."""
        engine, gpus = self._engine, self._engine.rank.world.group.size
        with self._lock:
            now = msgspec.structs.replace(self._answered)
        now.gpu_s = gpus * (time.monotonic() - self._began)
        if not engine.is_loaded:
            return now
        now.energy_j = (self._energy.joules or None) if self._energy else None
        times = engine.times
        now.load_s, now.prefill_s = times.load_s, times.prefill_s
        now.decode_s = max(0.0, times.forward_s + times.sample_s - times.prefill_s)
        stats = engine.scheduler.stats
        if prefilled := stats.prefill_tokens + stats.recomputed_tokens:
            saved_s = sum(now.cached.values()) * times.prefill_s / prefilled
            now.saved_gpu_s = gpus * (saved_s - times.load_s)
        if engine.store:
            size, num_bytes = engine.cache_config.block_tokens, engine.pages.whole.block_bytes
            keepers = [tier for tier in engine.store.tiers if not tier.keeps_copies_only and tier.survives_process]
            stored = {tier.name: tier.stats.stored for tier in keepers}
            now.written_tokens = size * max(stored.values(), default=0)
            now.written_bytes = {name: count * num_bytes for name, count in stored.items() if count}
            now.read_bytes = {tier: count * num_bytes for tier, count in engine.cache.stats.onboarded.items()}
        return now

    def _place(self) -> tuple[Path, MakeFolder, str | None] | None:
        """The ledger's folder, how to make folders in it, and the project it belongs to."""
        config = self._engine.rank.store_config
        if config is not None and self._engine.store:
            try:
                root = within(self._patience_s, partial(_open_for_ledger, Path(config.shared)))
                return root.layout.ledger(os.getuid()), root.make_own_folder, _group_name(root.policy.group)
            except (HpckvError, OSError) as error:  # one that may only be read, or that hangs
                _log.info("%s: the ledger is kept in the run directory, if there is one (%s)", config.shared, error)
        if self._run is None:
            return None
        return self._run / "ledger", partial(Path.mkdir, parents=True, exist_ok=True), None

    def _make_energy_meter(self) -> EnergyMeter:
        """Now that the model is loaded: before, no process of this replica is on a GPU."""
        rank = self._engine.rank
        world, first = rank.world, rank.dims.replica * rank.world.group.size
        own = [member for member in world.members if 0 <= member.rank - first < world.group.size]
        here = {member.rank for member in world.members if member.host == platform.node()}
        return energy_meter(
            rank.capability.kind,
            frozenset(member.pid for member in own) or frozenset({os.getpid()}),
            world.group.size,
            is_on_one_node=len({member.host for member in own}) <= 1,
            has_node=here <= {member.rank for member in own},
        )

    @property
    def _patience_s(self) -> float:
        """What does not answer holds nobody up for longer."""
        config = self._engine.rank.store_config
        return config.deadline_s if config else _RUN_PATIENCE_S

    def _pattern(self, project: str | None) -> Record:
        rank, config = self._engine.rank, self._engine.rank.store_config
        hosts = {member.host for member in rank.world.members}
        return Record.of_this_process(
            rank=rank.world.everyone.rank,
            project=project,
            run=self._run.resolve().name if self._run else None,
            model=Path(self._engine.settings.path).resolve().name,
            model_digest=rank.weights_digest or "",
            gpu=rank.capability.label,
            num_gpus=rank.world.group.size,
            num_nodes=max(1, len(hosts)),
            keep_s=config.keep_s if config else 0,
        )


def _open_for_ledger(path: Path) -> StoreRoot:
    root = StoreRoot.open(path)
    root.make_own_folder(root.layout.ledger(os.getuid()))
    return root


def _group_name(gid: int | None) -> str | None:
    try:
        return None if gid is None else grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _note_ledger(run: Path, path: Path, *, is_kept: bool) -> None:
    """Where the next start of this run looks for what this one has recorded; an empty note says that it could record nothing."""
    try:
        folder = run / "logs" / "ledgers"
        folder.mkdir(parents=True, exist_ok=True)
        where, home = path.resolve(), run.resolve()
        # One in the run directory is moved with it.
        place = where.relative_to(home) if where.is_relative_to(home) else where
        (folder / path.stem).write_text(f"{place}\n" if is_kept else "")
    except OSError as error:
        warn_once(_log, f"{run}: {error.strerror}; should this start be killed, its last minute is not accounted for")
