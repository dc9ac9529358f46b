"""Every detector's repair, measured: the prefix tree of the file as it is less that of the repaired one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from hpckv.workload.lint.changing import ChangingValues
from hpckv.workload.lint.costs import PrefixCosts
from hpckv.workload.lint.embedded import UnorderedJson
from hpckv.workload.lint.examples import ExampleOrder
from hpckv.workload.lint.order import StaticAfterDynamic
from hpckv.workload.lint.prompts import Prompt, Repaired, Spot, shown
from hpckv.workload.lint.similar import FewCharacters
from hpckv.workload.lint.spelling import CASE, SPACING

_SPOTS = 3
"""Examples of a finding."""
_MOST_ROUNDS = 8
"""Of safe repairs, until none finds anything: each may uncover something for another."""


class Detector(Protocol):
    """One thing that breaks prefix reuse. What it finds is what its repair changes."""

    @property
    def kind(self) -> str:
        """Its name in reports."""

    @property
    def what(self) -> str:
        """In a few words, what is wrong."""

    @property
    def remedy(self) -> str:
        """In one line; begins with `by hand` unless the repair is safe."""

    @property
    def is_safe(self) -> bool:
        """The repair changes how things are written or the order of whole parts, and loses nothing: `--fix` does it."""

    def repair(self, prompts: Sequence[Prompt]) -> Repaired:
        """All prompts, repaired where this is found. Deterministic; the prompts given stay as they are."""


Bar = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""Shows progress: given what is counted and how many there are, gives a function to call for each one done."""


def _no_bar(what: str, total: int) -> AbstractContextManager[Callable[[], None]]:
    return nullcontext(lambda: None)


DETECTORS: tuple[Detector, ...] = (
    ChangingValues(),
    SPACING,
    CASE,
    UnorderedJson(),
    ExampleOrder(),
    StaticAfterDynamic(is_safe=True),
    StaticAfterDynamic(is_safe=False),
    FewCharacters(),
)
"""In the order in which all are repaired: what hides other things first."""


@dataclass(frozen=True)
class Finding:
    """One kind of thing in one file."""

    kind: str
    what: str
    remedy: str
    is_safe: bool
    requests: int
    """That the repair changes."""
    tokens: int
    """Distinct-prefix tokens that repairing this alone saves."""
    tokens_in_turn: int
    """What it saves when the kinds before it in `DETECTORS` are repaired already: more where they stand before it in prompts, less
    where they save the same tokens. Over all detectors these add up to what all repairs save."""
    spots: tuple[Spot, ...]

    @property
    def sentence(self) -> str:
        """What it is and where."""
        places = ", ".join(
            f"line {spot.number} message {spot.message} character {spot.character}: {shown(spot.text)}"
            for spot in self.spots
        )
        return f"{self.what}; {places}"

    @property
    def record(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "kind": self.kind,
            "what": self.what,
            "requests": self.requests,
            "tokens": self.tokens,
            "tokens_in_turn": self.tokens_in_turn,
            "by_hand": not self.is_safe,
            "remedy": self.remedy,
            "examples": [{**spot._asdict(), "text": shown(spot.text)} for spot in self.spots],
        }


@dataclass(frozen=True)
class SafeRepairs:
    """What `--fix` writes."""

    prompts: list[Prompt]
    changes: dict[str, list[tuple[Prompt, Prompt]]]
    """By kind: each request before and after."""

    @property
    def num_requests(self) -> int:
        """That differ in any way."""
        return len({before.number for pairs in self.changes.values() for before, _ in pairs})


@dataclass(frozen=True)
class Report:
    """What was found in a file, the most expensive first, and the file's sums."""

    findings: tuple[Finding, ...]
    requests: int
    prompt_tokens: int
    distinct_tokens: int
    distinct_tokens_fixed: int
    """After the safe repairs."""
    distinct_tokens_repaired: int
    """After all repairs."""
    is_estimate: bool
    block_tokens: int
    fix: SafeRepairs

    @property
    def record(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "distinct_prefix_tokens": self.distinct_tokens,
            "distinct_prefix_tokens_after_fix": self.distinct_tokens_fixed,
            "distinct_prefix_tokens_after_all_repairs": self.distinct_tokens_repaired,
            "tokens_are_estimated": self.is_estimate,
            "block_tokens": self.block_tokens,
            "findings": [finding.record for finding in self.findings],
        }


def lint(prompts: Sequence[Prompt], costs: PrefixCosts, bar: Bar = _no_bar) -> Report:
    """Find, repair and measure everything. `bar(what, total)` shows how far it is."""
    with bar("prompts", len(prompts)) as step:
        now = costs.distinct_tokens(prompts, step)
    with bar("repairs", 2 * len(DETECTORS)) as step:
        return _measured(prompts, costs, now, step)


def _measured(prompts: Sequence[Prompt], costs: PrefixCosts, now: int, step: Callable[[], None]) -> Report:
    findings = []
    done, left = prompts, now
    for detector in DETECTORS:
        alone = detector.repair(prompts)
        step()
        in_turn = alone if done is prompts else detector.repair(done)
        tokens = now - costs.distinct_tokens(alone.prompts) if alone.spots else 0
        before = left
        if in_turn.spots:
            done, left = in_turn.prompts, costs.distinct_tokens(in_turn.prompts)
        step()
        if max(tokens, before - left) >= costs.block_tokens:
            findings.append(_finding(detector, alone.spots or in_turn.spots, tokens, before - left))
    findings.sort(key=lambda finding: (-finding.tokens, -finding.tokens_in_turn))
    fix = safely_repaired(prompts)
    return Report(
        tuple(findings),
        requests=len(prompts),
        prompt_tokens=costs.tokens(prompts),
        distinct_tokens=now,
        distinct_tokens_fixed=costs.distinct_tokens(fix.prompts),
        distinct_tokens_repaired=left,
        is_estimate=costs.is_estimate,
        block_tokens=costs.block_tokens,
        fix=fix,
    )


def safely_repaired(prompts: Sequence[Prompt]) -> SafeRepairs:
    """All safe repairs, again and again until nothing is found."""
    done = list(prompts)
    changes: dict[str, list[tuple[Prompt, Prompt]]] = {}
    for _ in range(_MOST_ROUNDS):
        before = done
        for detector in DETECTORS:
            if detector.is_safe:
                repaired = detector.repair(done)
                for index in sorted(repaired.spots):
                    changes.setdefault(detector.kind, []).append((done[index], repaired.prompts[index]))
                done = repaired.prompts
        if done == before:
            break
    return SafeRepairs(done, changes)


def _finding(detector: Detector, spots: dict[int, Spot], tokens: int, in_turn: int) -> Finding:
    first = tuple(spots[index] for index in sorted(spots)[:_SPOTS])
    return Finding(detector.kind, detector.what, detector.remedy, detector.is_safe, len(spots), tokens, in_turn, first)
