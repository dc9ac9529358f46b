"""Who of a run is still there: a TCP connection from every rank to rank 0, with a heartbeat each way.

MPI and NCCL do not say who is missing, they wait. Here a rank that dies is noticed at once (its connection ends), one that
hangs within `silence_s`, and one that stops on an error says so first. Rank 0 tells all others, so that every rank ends with
the same line. The port is chosen by the kernel; who connects must know the run's secret.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import select
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from hpckv.comm.group import RankLostError
from hpckv.comm.outcome import note_exit_code
from hpckv.errors import EXIT_DRAINED, HpckvError

_log = logging.getLogger(__name__)

BEAT_S = 1.0
LAST_WORDS_S = 5.0
"""The process is ended if its main thread has not taken note of bad news for so long: it is stuck in somebody's C code."""
SECRET_BYTES = 16


@dataclass(frozen=True)
class Member:
    """One rank, as people know it."""

    rank: int
    host: str
    pid: int
    log: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid}{', ' + self.log if self.log else ''})"


@dataclass(frozen=True)
class Trouble:
    """News of a lost rank, as it is passed on."""

    text: str
    exit_code: int


class _Line:
    """One connection: frames are lines of JSON, an empty line is a heartbeat."""

    def __init__(self, sock: socket.socket, member: Member) -> None:
        self.socket, self.member = sock, member
        self.heard = time.monotonic()
        self.said_goodbye = False
        self._partial = b""

    def send(self, frame: dict[str, Any] | None) -> bool:
        """Whether it could be handed to the kernel; never blocks for long."""
        try:
            self.socket.sendall(b"\n" if frame is None else json.dumps(frame).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """Frames that have come; None at the end."""
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [json.loads(line) for line in lines if line]


class Lifeline:
    """This rank's end. A thread of its own watches; `check()` in the main thread raises what it found."""

    def __init__(self, rank: int, lines: list[_Line], silence_s: float) -> None:
        self.rank = rank
        self._lines = lines
        self._silence_s = silence_s
        self._trouble: Trouble | None = None
        self._is_noted = threading.Event()
        self._is_closing = False
        self.wants_drain = False
        """Some rank was asked to stop."""
        self._thread = threading.Thread(target=self._run, name="hpckv-lifeline", daemon=True)
        self._thread.start()

    @classmethod
    def single(cls) -> Lifeline:
        """Nobody to watch."""
        return cls(0, [], 0.0)

    def check(self) -> None:
        """Raise `RankLostError`, or what another rank stopped on, if the run cannot go on."""
        if self._trouble:
            self._is_noted.set()
            error = RankLostError(self._trouble.text)
            error.exit_code = self._trouble.exit_code
            raise error

    def report(self, error: BaseException) -> None:
        """This rank ends because of `error`: everybody is told, once."""
        if self._trouble is None:
            is_ours = isinstance(error, HpckvError)
            code = error.exit_code if isinstance(error, HpckvError) else HpckvError.exit_code
            text = str(error) if is_ours else f"{type(error).__name__}: {error}"
            for line in self._lines:
                line.send({"error": text, "exit_code": code, "rank": self.rank})
            self._is_noted.set()

    def wait_for_root(self, seconds: float) -> None:
        """Until rank 0 is gone: it saves what it has, having been told."""
        deadline = time.monotonic() + seconds
        while self._lines and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)

    def ask_for_drain(self) -> None:
        """Tell rank 0 that this rank was asked to stop."""
        self.wants_drain = True
        for line in self._lines:
            line.send({"drain": True})

    def close(self) -> None:
        """The run is over: from now on nobody minds that this rank goes."""
        self._is_closing = True
        for line in self._lines:
            line.send({"goodbye": True})

    def _run(self) -> None:
        beat = awake = time.monotonic()
        while self._lines and not self._trouble:
            poll = select.poll()  # select() knows the first 1024 files only
            for line in self._lines:
                poll.register(line.socket, select.POLLIN)
            readable = {number for number, _ in poll.poll(BEAT_S * 250)}
            now = time.monotonic()
            if now - awake > self._silence_s / 2:  # it was this process that stood still, perhaps with all others
                for line in self._lines:
                    line.heard = now
            awake = now
            for line in list(self._lines):
                if line.socket.fileno() in readable:
                    self._hear(line)
                elif now - line.heard > self._silence_s and not (line.said_goodbye or self._is_closing):
                    self._lose(line, f"has said nothing for {self._silence_s:g} s: it hangs, or its node is gone")
            if now - beat >= BEAT_S:
                beat = now
                for line in self._lines:
                    line.send(None)
        if self._trouble and not self._is_noted.wait(LAST_WORDS_S):
            _log.critical("%s; this rank is stuck as well and ends now", self._trouble.text)
            os._exit(self._trouble.exit_code)

    def _hear(self, line: _Line) -> None:
        frames = line.receive()
        for frame in frames or ():
            if "error" in frame:
                source = line.member if frame["rank"] == line.member.rank else f"rank {frame['rank']}"
                text = frame["error"] if frame.get("is_known") else f"{source}: {frame['error']}"
                self._spread(Trouble(text, int(frame["exit_code"])), frame["rank"])
            line.said_goodbye |= "goodbye" in frame
            self.wants_drain |= "drain" in frame
        if frames is None:
            if not (line.said_goodbye or self._is_closing):
                self._lose(line, "is gone: it was killed, or its node is down")
            if line in self._lines:
                self._lines.remove(line)

    def _lose(self, line: _Line, why: str) -> None:
        self._spread(Trouble(f"{line.member} {why}", EXIT_DRAINED), line.member.rank)

    def _spread(self, trouble: Trouble, lost: int) -> None:
        if self._trouble:
            return
        note_exit_code(trouble.exit_code)
        frame = {"error": trouble.text, "exit_code": trouble.exit_code, "rank": lost, "is_known": True}
        for line in self._lines:
            if line.member.rank != lost:
                line.send(frame)
        self._trouble = trouble


class Listener:
    """Rank 0's side while the others connect."""

    def __init__(self, host: str) -> None:
        """`host` is the address of this node that the others reach."""
        self._socket = socket.create_server((host, 0))
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self.secret = os.urandom(SECRET_BYTES)

    def accept(self, members: list[Member], deadline_s: float, silence_s: float) -> Lifeline:
        """Until every other member has connected; raises `RankLostError` naming who has not."""
        missing = {member.rank: member for member in members if member.rank}
        lines: list[_Line] = []
        beat = time.monotonic()
        deadline = beat + deadline_s
        while missing:
            now = time.monotonic()
            if now - beat >= BEAT_S:
                beat = now
                for line in lines:
                    line.send(None)
            self._socket.settimeout(max(0.01, min(deadline - now, BEAT_S)))
            try:
                sock, _ = self._socket.accept()
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                names = ", ".join(map(str, missing.values()))
                raise RankLostError(f"no connection in {deadline_s:g} s from {names}") from None
            rank = _shake_hands(sock, self.secret)
            if rank in missing:
                lines.append(_Line(sock, missing.pop(rank)))
            else:
                sock.close()
        self._socket.close()
        return Lifeline(0, lines, silence_s)


def _shake_hands(sock: socket.socket, secret: bytes) -> int:
    """The rank that a newcomer proves to be, -1 for a stranger."""
    sock.settimeout(BEAT_S)
    try:
        hello = b""
        while len(hello) < SECRET_BYTES + 4 and (more := sock.recv(SECRET_BYTES + 4 - len(hello))):
            hello += more
    except OSError:
        return -1
    if len(hello) < SECRET_BYTES + 4 or not hmac.compare_digest(hello[:SECRET_BYTES], secret):
        return -1
    return int.from_bytes(hello[SECRET_BYTES:], "little")


def connect(
    rank: int, root: Member, address: tuple[str, int], secret: bytes, deadline_s: float, silence_s: float
) -> Lifeline:
    """Another rank's side; raises `RankLostError`."""
    try:
        sock = socket.create_connection(address, timeout=deadline_s)
        sock.sendall(secret + rank.to_bytes(4, "little"))
    except OSError as error:
        raise RankLostError(f"{root} cannot be reached at {address[0]}:{address[1]} ({error})") from None
    sock.settimeout(BEAT_S)
    return Lifeline(rank, [_Line(sock, root)], silence_s)
