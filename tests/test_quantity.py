"""Sizes and durations as people write them."""

import pytest

from hpckv.errors import ConfigError
from hpckv.quantity import ByteSize, format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("512", 512),
        ("4GB", 4 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("200 MiB", 200 * 2**20),
        (7, 7),
        ("2T", 2**41),
    ],
)
def test_sizes_are_read(text, value):
    assert ByteSize.parse(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "3 apples", "-1", -1, True, None, 1.5])
def test_other_things_are_refused(text):
    with pytest.raises(ConfigError, match="is not a size"):
        ByteSize.parse(text)


def test_they_are_printed_short():
    assert [format_bytes(n) for n in (0, 1536, 2**30, 5 * 2**50)] == ["0B", "1.5KiB", "1GiB", "5120TiB"]
    assert [format_duration(s) for s in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (156.4, "156"), (999.4, "999"), (999.6, "1.0k"), (41172, "41.2k"), (253_000, "253k")]
)
def test_counts_are_short(count, text):
    assert format_count(count) == text
