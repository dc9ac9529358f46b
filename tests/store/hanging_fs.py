"""A real filesystem that stops answering on command: FUSE over another folder, served by `hanging_server`.

A call that hangs here hangs in the kernel, as on a dead server: no signal and no Python wakes its caller.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.store.mounts import run

EVERYTHING = "everything"


class HangingFilesystem:
    """`point` shows `folder`; what `hang` names does not return until `answer`."""

    def __init__(self, folder: Path) -> None:
        self.behind, self.point, self._orders = folder / "behind", folder / "point", folder / "orders"
        self.behind.mkdir()
        self.point.mkdir()
        self._orders.write_text("")
        command = [
            sys.executable,
            "-m",
            "tests.store.hanging_server",
            *map(str, (self.behind, self.point, self._orders)),
        ]
        self._server = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        while not self.point.is_mount():
            assert self._server.poll() is None, "no FUSE here?"
            time.sleep(0.02)

    def hang(self, *calls: str) -> None:
        """From now on these calls (as FUSE names them) hang; `EVERYTHING`: the server is stopped."""
        if calls == (EVERYTHING,):
            self._server.send_signal(signal.SIGSTOP)
        else:
            self._orders.write_text(" ".join(calls))

    def answer(self) -> None:
        """Everything is answered again, also what hangs."""
        self._server.send_signal(signal.SIGCONT)
        self._orders.write_text("")

    def close(self) -> None:
        """Whoever still hangs gets an error."""
        run(["umount", "--lazy", str(self.point)])
        self._server.kill()
        self._server.wait()
