"""The identity matrix holds, and it would notice if it did not."""

import pytest

from hpckv.store import identity
from hpckv.store.identity_matrix import MISS, RIGHT, WRONG, check_rows


def test_every_row_is_as_expected():
    found = {row.change: (row.expected, outcome) for row, outcome in check_rows()}
    assert {change: pair for change, pair in found.items() if pair[0] != pair[1]} == {}
    assert len(found) >= 28
    assert {expected for expected, _ in found.values()} == {MISS, RIGHT}


@pytest.mark.parametrize("forgotten", ["weights", "config", "quantization", "adapter"])
def test_a_key_that_leaves_something_out_is_noticed(monkeypatch, forgotten):
    complete = identity.Identity.record.fget

    def incomplete(self):
        return {name: value for name, value in complete(self).items() if name != forgotten}

    monkeypatch.setattr(identity.Identity, "record", property(incomplete))
    outcomes = [(row.expected, outcome) for row, outcome in check_rows()]
    assert any(expected == MISS and outcome in (RIGHT, WRONG) for expected, outcome in outcomes)
