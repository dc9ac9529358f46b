"""A real shared filesystem for tests: one GlusterFS brick, and clients of it that know nothing of each other.

No glusterd and no network: brick and clients are given their volume files and meet on a unix socket. Every process dies
with the one that started it; what is left in any case is unmounted by name.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PATIENCE_S = 20.0


@dataclass(frozen=True)
class Client:
    """How a client sees the brick."""

    translators: Sequence[str]
    """Above the network, from below."""
    options: Sequence[str]

    @property
    def staleness_s(self) -> float:
        """For how long it may show what another client has changed as it was."""
        return max(float(o.partition("=")[2]) for o in self.options if "-timeout=" in o)


STALE = Client(
    ("write-behind", "open-behind", "quick-read", "md-cache"),
    ("--attribute-timeout=1", "--entry-timeout=1", "--negative-timeout=1"),
)
"""As `glusterd` would set it up, and much like NFS: writes wait, a file is opened when it is read, names and attributes
are believed for a second."""
STRICT = Client((), ("--attribute-timeout=0", "--entry-timeout=0", "--negative-timeout=0", "--direct-io-mode=enable"))
"""Asks the brick every time."""

_BRICK = """
volume posix
  type storage/posix
  option directory {brick}
end-volume
volume locks
  type features/locks
  subvolumes posix
end-volume
volume io
  type performance/io-threads
  option thread-count 4
  subvolumes locks
end-volume
volume server
  type protocol/server
  option transport-type socket
  option transport.address-family unix
  option transport.socket.listen-path {socket}
  option auth.addr.io.allow *
  subvolumes io
end-volume
"""
_CLIENT = """
volume client
  type protocol/client
  option transport-type socket
  option transport.address-family unix
  option transport.socket.connect-path {socket}
  option remote-host localhost
  option remote-subvolume io
end-volume
"""
_ABOVE = """
volume {name}
  type performance/{name}
  subvolumes {below}
end-volume
"""


class GlusterFS:
    """A brick's folder, and one mount for each client."""

    def __init__(self, folder: Path, clients: Mapping[str, Client]) -> None:
        self.brick, self.mounts = folder / "brick", {name: folder / name for name in clients}
        self._folder, self._socket, self._clients = folder, folder / "socket", clients
        self._processes: dict[str, subprocess.Popen] = {}

    def start(self, at: Path | None = None, inside: Mapping[str, Sequence[str]] | None = None) -> None:
        """`at` is one mount point for all clients; `inside` begins the command of a client that has mounts of its own."""
        inside = inside or {}
        if at:
            self.mounts = dict.fromkeys(self._clients, at)
        for part in (self._folder, self.brick, *self.mounts.values()):
            part.mkdir(exist_ok=True)
            part.chmod(0o755)
        self.start_brick()
        for name, client in self._clients.items():
            text, below = _CLIENT.format(socket=self._socket), "client"
            for above in client.translators:
                text, below = text + _ABOVE.format(name=above, below=below), above
            self._run(name, [*inside.get(name, ()), "glusterfs"], text, *client.options, str(self.mounts[name]))
        for name in self.mounts:
            self._wait(name, lambda name=name: self._is_there(name, inside.get(name, ())))

    def start_brick(self) -> None:
        self._socket.unlink(missing_ok=True)
        self._run("brick", ["glusterfsd"], _BRICK.format(brick=self.brick, socket=self._socket))
        self._wait("brick", self._is_listening)

    def stop_brick(self) -> None:
        """Like a server that fails: it does not say goodbye. Clients come back by themselves, about 3 s after its return."""
        process = self._processes.pop("brick")
        process.kill()
        process.wait()

    def is_back(self, name: str) -> bool:
        """Whether a client has found the brick again."""
        return _answers(self.mounts[name])

    def stop(self) -> None:
        """Clients first: each unmounts itself, unless it hangs."""
        for name in reversed(self._processes):
            process = self._processes[name]
            process.terminate()
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for mount in self.mounts.values():
            if _is_mounted(mount):
                subprocess.run(["umount", "-l", str(mount)], check=True)

    def _run(self, name: str, program: Sequence[str], volume: str, *arguments: str) -> None:
        (self._folder / f"{name}.vol").write_text(volume)
        files = ["-f", str(self._folder / f"{name}.vol"), "-l", str(self._folder / f"{name}.log")]
        command = ["setpriv", "--pdeathsig", "TERM", *program, "--no-daemon", *files, *arguments]
        self._processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def _is_there(self, name: str, inside: Sequence[str]) -> bool:
        point = str(self.mounts[name])
        if inside:  # a mount is seen from its own namespace only
            seen = subprocess.run(
                [*inside, "stat", "-f", "-c", "%T", point], capture_output=True, text=True, check=False
            )
            return seen.stdout.strip() == "fuseblk" or "fuse" in seen.stdout
        return _is_mounted(self.mounts[name]) and _answers(self.mounts[name])

    def _wait(self, name: str, is_there) -> None:
        end = time.monotonic() + _PATIENCE_S
        while not is_there():
            if self._processes[name].poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} does not come up: " + (self._folder / f"{name}.log").read_text()[-2000:])
            time.sleep(0.02)

    def _is_listening(self) -> bool:
        with socket.socket(socket.AF_UNIX) as attempt, contextlib.suppress(OSError):
            attempt.connect(str(self._socket))
            return True
        return False


def _is_mounted(folder: Path) -> bool:
    """By the kernel's list: asking the folder itself may hang."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return str(folder) in (line.split()[4].encode().decode("unicode_escape") for line in mounts)


def _answers(folder: Path) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(["stat", "-f", str(folder)], capture_output=True, timeout=_PATIENCE_S).returncode == 0
    return False


@contextlib.contextmanager
def glusterfs(clients: Mapping[str, Client]) -> Iterator[GlusterFS]:
    """Up, and down again whatever happens; in memory where there is such a folder. Needs root."""
    shm = Path("/dev/shm")
    # Not in a test's own folder: a socket's path may be 107 bytes long.
    folder = Path(tempfile.mkdtemp(prefix="hpckv-glusterfs-", dir=shm if os.access(shm, os.W_OK) else None))
    system = GlusterFS(folder, clients)
    try:
        system.start()
        yield system
    finally:
        system.stop()
        shutil.rmtree(folder)
