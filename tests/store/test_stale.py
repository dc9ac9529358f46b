"""What a network filesystem does to those who look at it through a cache: late news, stale handles, servers that go and come.

`test_glusterfs.py` meets the same for real; here each comes alone.
"""

import errno
import os
import time
from pathlib import Path

import pytest

from hpckv.store import catalog as catalog_module
from hpckv.store import root as root_module
from hpckv.store.catalog import Catalog
from hpckv.store.file_tier import FileTier
from hpckv.store.layout import StoreLayout
from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.store.segment import Segment
from hpckv.testing.tier_suite import make_block
from tests.store.test_index import CONTEXT, catalog, write_segments

UID = os.getuid()


def failing(real, number: int, *, after: bool = False):
    """The call, with an error for an answer; `after` it was done."""

    def call(*args, **options):
        if after:
            real(*args, **options)
        raise OSError(number, os.strerror(number))

    return call


def only_for(suffix: str, spoiled, real):
    return lambda path, *args, **options: (spoiled if str(path).endswith(suffix) else real)(path, *args, **options)


def present(found: Catalog, numbers) -> list[bool]:
    return found.present([make_block(n).key for n in numbers]).tolist()


def reader(folder: Path) -> FileTier:
    return FileTier(Catalog(StoreLayout(folder), CONTEXT), CONTEXT, None, refresh_s=1e6)


def test_an_error_of_close_is_no_error_and_closes_nothing_else(tmp_path, monkeypatch):
    write_segments(tmp_path, range(8))
    (path, *_) = tmp_path.glob("u/*/seg/*/*.h5")
    segment = Segment(path, CONTEXT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", failing(os.close, errno.ESTALE, after=True))
        segment.close()
    mine = os.open(tmp_path, os.O_RDONLY)  # takes the number of the descriptor that was closed with an error
    del segment
    os.fstat(mine)
    os.close(mine)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ENOENT, errno.EACCES])
def test_a_segment_that_cannot_be_read_now_is_read_later(tmp_path, monkeypatch, number):
    write_segments(tmp_path, range(8))
    folder = next(tmp_path.glob("u/*/seg/*"))
    os.utime(folder, (1e9, 1e9))  # nothing changes any more
    real = os.open
    monkeypatch.setattr(os, "open", only_for(".h5", failing(real, number), real))
    found = catalog(tmp_path)
    assert present(found, range(8)) == [False] * 8
    monkeypatch.setattr(os, "open", real)
    found.refresh()
    assert present(found, range(8)) == [False] * 8, "not again and again"
    later = time.monotonic() + catalog_module._RETRY_S
    monkeypatch.setattr(time, "monotonic", lambda: later)
    found.refresh()
    assert present(found, range(8)) == [True] * 8


@pytest.mark.parametrize(
    ("number", "cause"), [(errno.EIO, "io"), (errno.ENOTCONN, "io"), (errno.ESTALE, "gone"), (errno.ENOENT, "gone")]
)
def test_a_block_that_cannot_be_read_now_is_a_miss_and_later_a_hit(tmp_path, monkeypatch, number, cause):
    write_segments(tmp_path, range(8))
    tier = reader(tmp_path)
    real = os.open
    monkeypatch.setattr(os, "open", only_for(".h5", failing(real, number), real))
    assert tier.get(make_block(3).key) is None
    assert tier.stats.misses == {cause: 1}
    monkeypatch.setattr(os, "open", real)
    assert bytes(tier.get(make_block(5).key)) == make_block(5).payload
    later = time.monotonic() + catalog_module._RETRY_S
    monkeypatch.setattr(time, "monotonic", lambda: later)
    tier.catalog.refresh()
    assert bytes(tier.get(make_block(3).key)) == make_block(3).payload
    tier.close()


def test_a_damaged_segment_is_left_alone_for_good(tmp_path, monkeypatch):
    write_segments(tmp_path, range(8))
    tier = reader(tmp_path)
    ((path, _),) = tier.catalog.places(make_block(3).key)
    content = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(bytes(len(content)))
    path.chmod(0o440)
    assert tier.get(make_block(3).key) is None
    assert tier.stats.misses == {"damaged": 1}
    monkeypatch.setattr(time, "monotonic", lambda: 1e12)
    tier.catalog.refresh()
    assert present(tier.catalog, [3, 5]) == [False, True]
    tier.close()


def test_indexes_that_cannot_be_listed_only_cost_opening_the_segments(tmp_path, monkeypatch):
    write_segments(tmp_path, range(40)).consolidate(UID)
    real = os.scandir
    idx = str(next(tmp_path.glob("u/*/idx/*")))
    monkeypatch.setattr(os, "scandir", only_for(idx, failing(real, errno.EACCES), real))
    assert present(catalog(tmp_path), range(40)) == [True] * 40


@pytest.mark.parametrize("server_s", [0.0, -3600.0, 3600.0])
def test_two_segments_in_one_tick_of_a_servers_clock_are_both_seen(tmp_path, server_s):
    stamp = (time.time() + server_s,) * 2
    write_segments(tmp_path, range(2))
    folder = next(tmp_path.glob("u/*/seg/*"))
    os.utime(folder, stamp)
    found = catalog(tmp_path)
    write_segments(tmp_path, range(2, 4))
    os.utime(folder, stamp)
    found.refresh()
    assert present(found, range(4)) == [True] * 4


def test_a_marker_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    StoreRoot.create(tmp_path / "kv", StorePolicy.new())
    real, opened = root_module.open_trusted, []

    def stale_at_first(path, trusted_uids):
        opened.append(path)
        if len(opened) == 1:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, trusted_uids)

    monkeypatch.setattr(root_module, "open_trusted", stale_at_first)
    StoreRoot.open(tmp_path / "kv")
    assert len(opened) == 2
