"""Power is cut while segments are written, collected and compacted: nothing torn is seen, nothing acknowledged is lost.

Real ext4 and xfs in an image; the kernel's shutdown ioctl throws away what was not synced. With fsync taken out of the
program the same cut is seen to lose. The work runs in forks of a small process (this module as a program).
"""

import errno
import json
import os
import random
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from hpckv.errors import StoreError
from hpckv.quantity import ByteSize
from hpckv.store.collect import Collector
from hpckv.store.durable import publish
from hpckv.store.inspect import check
from hpckv.store.policy import Quota, StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.store.survey import Survey
from tests.store.mounts import FILESYSTEMS, IN_OWN_MOUNTS, PoweredDisk
from tests.store.test_faults import RefusedError, do_collect, do_compact, read, write

BATCH = 6
QUOTA = Quota(bytes=ByteSize(2**18))
NEWEST = 6
"""So many blocks of a store with this quota are certainly still there."""
LEFT_OUT: dict[str, Callable[[int], bool]] = {
    "nothing": lambda mode: False,
    "both": lambda mode: True,
    "of folders": stat.S_ISDIR,
    "of files": stat.S_ISREG,
}
"""Which fsync() calls a writer does not make."""


def leave_fsync_out(which: str) -> None:
    """For the rest of this process's life."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if not LEFT_OUT[which](os.fstat(fd).st_mode):
            real(fd)

    os.fsync = fsync


class Writer:
    """A process that writes blocks to one store and says through a pipe which of them it was told are safe."""

    def __init__(self, store: Path, first: int, quota: Quota, then: Callable, left_out: str = "nothing") -> None:
        self.store, self.first = store, first
        self.acknowledged: list[int] = []
        self._data = b""
        read_end, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read_end)
            leave_fsync_out(left_out)
            self._work(write_end, quota, then, pauses=left_out != "nothing")
        os.close(write_end)
        self.pipe = read_end

    def _work(self, write_end: int, quota: Quota, then: Callable, pauses: bool) -> None:
        def acknowledge(numbers: list[int]) -> None:
            os.write(write_end, b"".join(n.to_bytes(4, "little") for n in numbers))
            if pauses:
                signal.pause()  # whatever it did next could bring this to the disk after all

        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # after the cut everything fails, and is said
        try:
            if not StoreRoot.exists(self.store):
                StoreRoot.create(self.store, StorePolicy.new(quota=quota))
            for first in range(self.first, self.first + 10**6, BATCH):
                write(self.store, range(first, first + BATCH), acknowledge)
                then(self.store, acknowledge)
        finally:
            os._exit(0)

    def hear(self) -> bool:
        """Take what it has said; False at the end."""
        data = os.read(self.pipe, 65536)
        self._data += data
        count = len(self._data) // 4
        self.acknowledged += [int.from_bytes(self._data[4 * i : 4 * i + 4], "little") for i in range(count)]
        self._data = self._data[4 * count :]
        return bool(data)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        while self.hear():
            pass
        os.close(self.pipe)


def lose_power(disk: PoweredDisk, writers: list[Writer], *, after_s: float, acknowledgements: int) -> None:
    """Cut after so many seconds or right after so many acknowledgements; then the machine starts again."""
    end = time.monotonic() + after_s
    while (left := end - time.monotonic()) > 0 and acknowledgements > 0:
        heard, _, _ = select.select([w.pipe for w in writers], [], [], left)
        acknowledgements -= len(heard)
        for writer in writers:
            if writer.pipe in heard:
                writer.hear()
    disk.cut()
    for writer in writers:
        writer.kill()
    disk.power_off()
    disk.power_on()


def torn(store: Path) -> list[str]:
    """Files under their final name that do not verify, once orphans were swept."""
    if not StoreRoot.exists(store):
        return []
    try:
        root = StoreRoot.open(store)
    except StoreError as error:
        return [str(error)]
    Collector(root).collect()
    survey = Survey(root.layout)
    survey.refresh()
    return [f"{finding.file.path.name}: {finding.what}" for finding in check(root, survey).findings]


def found_in(store: Path, numbers: Iterable[int]) -> set[int]:
    """Those of the blocks that can be read back; they are right, or this raises."""
    try:
        return set(read(store, sorted(numbers))) if StoreRoot.exists(store) else set()
    except RefusedError:
        return set()


def cuts(folder: Path, kind: str, count: int) -> Iterator[dict]:
    """What each cut did to two stores: one whose owner compacts, one with a quota whose owner collects."""
    disk, rng = PoweredDisk(folder, kind), random.Random(9)
    whole, bounded = disk.point / "whole", disk.point / "bounded"
    kept: set[int] = set()
    for number in range(count):
        if number % 4 == 0:  # from nothing: the stores themselves are made under the cut
            for store in (whole, bounded):
                shutil.rmtree(store, ignore_errors=True)
            os.sync()
            kept = set()
        first = number * 10**6
        writers = [Writer(whole, first, Quota(), do_compact), Writer(bounded, first, QUOTA, do_collect)]
        # Half of the cuts fall anywhere, half where an acknowledgement has just been given.
        if number % 2:
            lose_power(disk, writers, after_s=60, acknowledgements=rng.randint(1, 6))
        else:
            lose_power(disk, writers, after_s=rng.random(), acknowledgements=1 << 30)
        kept.update(writers[0].acknowledged)
        newest = set(writers[1].acknowledged[-NEWEST:])
        lost = kept - found_in(whole, kept) | newest - found_in(bounded, newest)
        for store, writer in zip((whole, bounded), writers, strict=True):  # also what nobody was told of is right
            found_in(store, range(first, max(writer.acknowledged, default=first) + 2 * BATCH))
        acknowledged = sum(len(writer.acknowledged) for writer in writers)
        yield {"acknowledged": acknowledged, "lost": len(lost), "torn": torn(whole) + torn(bounded)}
    disk.power_off()


def cut_without_fsync(folder: Path, kind: str, left_out: str) -> dict:
    """What one cut does to a writer that leaves fsync() calls out."""
    disk = PoweredDisk(folder, kind)
    StoreRoot.create(disk.point / "kv", StorePolicy.new())
    os.sync()
    writer = Writer(disk.point / "kv", 0, Quota(), do_compact, left_out)
    lose_power(disk, [writer], after_s=60, acknowledgements=1)
    lost = set(writer.acknowledged) - found_in(disk.point / "kv", writer.acknowledged)
    found = {"acknowledged": len(writer.acknowledged), "lost": len(lost), "torn": torn(disk.point / "kv")}
    disk.power_off()
    return found


def cut_at_the_last_fsync(folder: Path, kind: str) -> dict:
    """What publish() says when the filesystem goes down, as after a device's error, with only the folder left to sync."""
    disk, real = PoweredDisk(folder, kind), os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            disk.cut()
        real(fd)

    os.fsync = fsync
    try:
        publish(disk.point / "file", [b"content"])
        said = "published"
    except OSError as error:
        said = errno.errorcode[error.errno]
    disk.power_off()
    disk.power_on()
    found = {"said": said, "there": (disk.point / "file").exists()}
    disk.power_off()
    return found


def in_a_small_process(*arguments: object) -> dict:
    """Run this module as a program with mounts of its own; what it found, summed up over its cuts."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        command = [*IN_OWN_MOUNTS, sys.executable, "-m", __spec__.name, folder, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    print(*arguments, done.stdout)  # pytest -rP shows it
    return json.loads(done.stdout)


def check_that_nothing_is_lost(kind: str, count: int) -> None:
    found = in_a_small_process(kind, count)
    assert (found["cuts"], found["lost"], found["torn"]) == (count, 0, [])
    assert found["acknowledged"] > count


@pytest.mark.root
@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_a_power_cut_loses_nothing_acknowledged_and_tears_nothing(kind):
    check_that_nothing_is_lost(kind, 6)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_fifty_power_cuts(kind):
    check_that_nothing_is_lost(kind, 50)


@pytest.mark.root
@pytest.mark.parametrize("kind", FILESYSTEMS)
@pytest.mark.parametrize("left_out", ["both", "of folders", "of files"])
def test_without_either_fsync_a_cut_is_seen_to_lose(kind, left_out):
    found = in_a_small_process(kind, left_out)
    assert found["acknowledged"] == found["lost"] > 0
    if left_out == "of files":  # the name is on the disk, what it names is not
        assert any(name.endswith(".h5: too short") for name in found["torn"])


@pytest.mark.root
@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_a_file_is_not_published_if_the_filesystem_goes_down_at_the_last_fsync(kind):
    assert in_a_small_process(kind, "at the last fsync") == {"said": "EIO", "there": False}


if __name__ == "__main__":
    folder, kind, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if how in LEFT_OUT:
        answer = cut_without_fsync(folder, kind, how)
    elif how == "at the last fsync":
        answer = cut_at_the_last_fsync(folder, kind)
    else:
        each = list(cuts(folder, kind, int(how)))
        answer = {
            "cuts": len(each),
            "acknowledged": sum(cut["acknowledged"] for cut in each),
            "lost": sum(cut["lost"] for cut in each),
            "torn": [name for cut in each for name in cut["torn"]],
        }
    print(json.dumps(answer))
