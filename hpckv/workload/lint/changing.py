"""Values that change from request to request, before text that does not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from hpckv.workload.lint.masks import masked, values_of, values_with_names
from hpckv.workload.lint.prompts import Prompt, Repaired, Spot, Units, from_units, place_of, units
from hpckv.workload.lint.walk import nodes

_LEAST_SHARED = 64
"""Characters that stand behind the value and are the same in requests with another value."""
_MOST_VALUES = 8
"""Units with such values in one prompt; more are a table of data, not a date in a heading."""


class ChangingValues:
    """Dates, ids and counters in prefixes that are equal but for them. The repair takes them to the end of the prompt."""

    kind = "changing value"
    what = "a date, time, id, counter or random token stands before text that requests with other values share"
    remedy = "by hand: leave the value out, or move it to the end of the last message; moving it changes what is said"
    is_safe = False

    def repair(self, prompts: Sequence[Prompt]) -> Repaired:
        """Prompts with a placeholder for each such value, and the values in a paragraph at the end."""
        rows = [units(prompt) for prompt in prompts]
        repaired = Repaired(list(prompts))
        for row, places in _changing(rows).items():
            pieces = list(rows[row])
            values: list[str] = []
            for place in places:
                values += values_of(pieces[place])
                pieces[place] = masked(pieces[place])
            first = rows[row][places[0]]
            start = next(values_with_names(first))[0]
            message, character = place_of(rows[row], places[0])
            spot = Spot(prompts[row].number, message, character + start, first[start:].strip())
            repaired.put(row, from_units(prompts[row], pieces).with_end(" ".join(values)), spot)
        return repaired


def _changing(rows: Sequence[Units]) -> dict[int, list[int]]:
    """Of each row that has some: the places of changing values with shared text behind them."""
    forms = [0] * len(rows)
    """Rows of one node that had equal values so far have equal numbers."""
    numbers: dict[tuple[int, tuple[str, ...]], int] = {}
    places: dict[int, list[int]] = defaultdict(list)
    wanted: dict[int, int] = {}
    """Of each row: how many of its places have enough shared text behind them."""
    shared: dict[int, int] = defaultdict(int)
    for place, members in nodes(rows):
        if len({forms[row] for found in members.values() for row in found}) > 1:
            for unit, found in members.items():
                for row in found:
                    shared[row] += len(unit)
                    if shared[row] >= _LEAST_SHARED:
                        wanted[row] = len(places[row])
        values = {unit: values_of(unit) for unit in members} if len(members) > 1 else {}
        if len(set(values.values())) > 1:
            for unit, found in members.items():
                for row in found:
                    if wanted.get(row, 0) == len(places[row]):
                        shared[row] = 0
                    places[row].append(place)
                    forms[row] = numbers.setdefault((forms[row], values[unit]), len(numbers) + 1)
    return {row: places[row][:count] for row, count in wanted.items() if 0 < count <= _MOST_VALUES}
