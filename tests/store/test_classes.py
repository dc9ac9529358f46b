"""How long segments stay: classes of their own, refreshed by use; and the logs that say so do not pile up."""

import os
import time

import pytest

from hpckv.errors import ConfigError
from hpckv.quantity import ByteSize
from hpckv.store import StoreConfig, open_store
from hpckv.store.collect import Collector
from hpckv.store.compact import compact
from hpckv.store.config import PINNED_S
from hpckv.store.policy import Quota, StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.store.survey import HALF_LIFE_S, Survey, Use, merged_heat_record, read_heat
from hpckv.testing.tier_suite import GEOMETRY, make_block
from tests.store.shared_store import NAMESPACE, get, put

DAY = 86400


def aged(root: StoreRoot, seconds: float) -> None:
    """Make everything written so far look older."""
    for path in root.layout.users.rglob("*.h5"):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def opened(folder, **policy) -> StoreRoot:
    return StoreRoot.create(folder, StorePolicy.new(**policy))


def collected(root: StoreRoot) -> int:
    return sum(file.kind == "segment" for file in Collector(root).collect())


def test_a_class_expires_and_only_that(tmp_path):
    root = opened(tmp_path / "kv")
    for number, keep in enumerate(["5min", "1h", "7d", "pinned", "default"]):
        put(root.layout.root, [number], keep=keep)
    gone = []
    for seconds in (60, 1200, 7200, 8 * DAY, 40 * DAY):
        aged(root, seconds)
        collected(root)
        gone.append(get(root.layout.root, range(5)).count(False))
    assert gone == [0, 1, 2, 3, 3], "`default` waits for pressure, `pinned` for ever"


def test_use_refreshes(tmp_path):
    root = opened(tmp_path / "kv")
    put(root.layout.root, [1], keep="1h")
    put(root.layout.root, [2], keep="1h")
    aged(root, 7200)
    # One of them is read now, by a run that may write its heat.
    tiers = open_store(StoreConfig(shared=str(root.layout.root), host_size=ByteSize(0)), NAMESPACE, GEOMETRY)
    assert tiers.load(make_block(1))
    tiers.close()
    assert get(root.layout.root, [1, 2]) == [True, False]


def test_under_pressure_pinned_stays_and_expired_goes_first(tmp_path):
    root = opened(tmp_path / "kv", quota=Quota(files=30))
    put(root.layout.root, [1], keep="pinned")
    for number in range(2, 6):
        put(root.layout.root, [number])
    for number in range(6, 40):
        put(root.layout.root, [number])
    found = get(root.layout.root, range(1, 40))
    assert found[0], "pinned"
    assert not found[1], "the oldest of the others"
    assert found[-1]


def test_somebody_elses_log_decides_nothing_about_mine(tmp_path):
    name = f"{os.getuid() + 1}/seg/x/y.h5"
    path = tmp_path / "heat.json"
    path.write_bytes(merged_heat_record({name: Use(0, 0, PINNED_S)}, time.time()))
    path.chmod(0o440)
    assert list(read_heat(path, os.getuid(), time.time())) == []


def test_logs_are_merged_and_say_the_same(tmp_path):
    root = opened(tmp_path / "kv")
    put(root.layout.root, [1], keep="30d")
    config = StoreConfig(shared=str(root.layout.root), host_size=ByteSize(0))
    survey = Survey(root.layout)
    for _ in range(20):
        tiers = open_store(config, NAMESPACE, GEOMETRY)
        assert tiers.load(make_block(1))
        tiers.close()
    survey.refresh()
    (use,) = survey.uses().values()
    assert use.heat == pytest.approx(20, rel=1e-3)
    assert use.keep_s == 30 * DAY
    assert len(list(root.layout.heat(os.getuid()).iterdir())) <= 8


def test_a_merged_log_ages_each_use_by_itself(tmp_path):
    now = time.time()
    path = tmp_path / "heat.json"
    uses = {"1/seg/n/a.h5": Use(4.0, now - HALF_LIFE_S), "1/seg/n/b.h5": Use(4.0, now)}
    path.write_bytes(merged_heat_record(uses, now))
    path.chmod(0o440)
    read = dict(read_heat(path, os.getuid(), now))
    assert {name: (round(u.heat, 6), u.last) for name, u in read.items()} == {
        name: (u.heat, u.last) for name, u in uses.items()
    }


def test_compaction_keeps_classes_apart(tmp_path):
    root = opened(tmp_path / "kv")
    for number in range(4):
        put(root.layout.root, [number], keep="pinned" if number % 2 else "1h")
    compact(root, target_bytes=1 << 20)
    assert len(list(root.layout.users.rglob("*.h5"))) == 2
    aged(root, 40 * DAY)
    # Being rewritten counts as a use; a day later the class applies again.
    for log in root.layout.heat(os.getuid()).iterdir():
        uses = {n: Use(0, 0, u.keep_s) for n, u in read_heat(log, os.getuid(), time.time())}
        log.chmod(0o640)
        log.write_bytes(merged_heat_record(uses, time.time()))
    collected(root)
    assert get(root.layout.root, range(4)) == [False, True, False, True]


@pytest.mark.parametrize("keep", ["", "soon", "5", "-1h", "0s", "200000d"])
def test_what_is_no_class_is_refused(keep):
    with pytest.raises(ConfigError) as caught:
        StoreConfig(shared="x", keep=keep)
    assert "\n" not in str(caught.value)


def test_pinned_stays_pinned_without_its_log(tmp_path):
    root = opened(tmp_path / "kv", quota=Quota(files=30))
    put(root.layout.root, [1], keep="pinned")
    for log in root.layout.heat(os.getuid()).iterdir():
        log.unlink()
    for number in range(2, 40):
        put(root.layout.root, [number])
    assert get(root.layout.root, [1, 2, 39]) == [True, False, True]


@pytest.mark.parametrize(
    "content",
    [
        b'{"v": 1, "time": 1, "reads": {}, "keeps": {"UID/x": Infinity}}',
        b'{"v": 1, "time": 1, "reads": {"x": 1e400}, "keeps": {}}',
        b'{"v": 1, "time": 1, "reads": {"x": ' + b"9" * 5000 + b'}, "keeps": {}}',
        b"[" * 100_000,
    ],
)
def test_a_log_of_nonsense_is_no_log(tmp_path, content):
    root = opened(tmp_path / "kv")
    put(root.layout.root, [1], keep="1h")
    log = root.layout.heat(os.getuid()) / "nonsense.json"
    log.write_bytes(content.replace(b"UID", str(os.getuid()).encode()))
    log.chmod(0o440)
    assert put(root.layout.root, [2])
    assert get(root.layout.root, [1, 2]) == [True, True]
    collected(root)
