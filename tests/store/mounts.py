"""Real filesystems for tests: images with ext4 or xfs that can lose power, and small ones in memory. Needs root."""

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

FILESYSTEMS = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q"]}
_IMAGE_BYTES = 320 * 1024**2  # the least that mkfs.xfs takes; a hole but for what is written
_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, and with the same number XFS_IOC_GOINGDOWN
_NO_LOG_FLUSH = (2).to_bytes(4, "little")
IN_OWN_MOUNTS = ["unshare", "--mount", "--propagation", "private"]
"""Before a command: what it mounts goes with its last process, however that ends."""


class PoweredDisk:
    """A filesystem in an image file, mounted at `point`."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.image, self.point = folder / f"{kind}.img", folder / kind
        with self.image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        run([*FILESYSTEMS[kind], str(self.image)])
        self.point.mkdir()
        self.power_on()

    def power_on(self) -> None:
        """Mount; the kernel replays the journal."""
        run(["mount", "-o", "loop", str(self.image), str(self.point)])  # the loop device goes with the mount

    def cut(self) -> None:
        """From now on nothing reaches the image: neither data nor journal that only the kernel's memory has."""
        fd = os.open(self.point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(fd)

    def power_off(self) -> None:
        """Unmount, with it what was in memory."""
        unmount(self.point)


@contextlib.contextmanager
def small_filesystem(point: Path, **limits: int | str) -> Iterator[Path]:
    """A tmpfs at `point`, with limits as mount(8) names them: `size`, `nr_inodes`."""
    point.mkdir(exist_ok=True)
    run(["mount", "-t", "tmpfs", "-o", ",".join(f"{k}={v}" for k, v in limits.items()), "hpckv-test", str(point)])
    try:
        yield point
    finally:
        unmount(point)


def unmount(point: Path) -> None:
    """Wait until it is really gone."""
    for _ in range(100):
        if not subprocess.run(["umount", str(point)], capture_output=True).returncode:
            return
        time.sleep(0.05)  # a process that was killed still gives its files back
    run(["umount", "--lazy", str(point)])


def run(command: list[str]) -> None:
    """Raises `AssertionError` with what the command said."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
