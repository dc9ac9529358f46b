"""Messages of any length between two ranks, without waiting: the length first, then the bytes.

Both sides make one and use no other messages of these tags. Whoever has posted the last one closes; the other then knows
that nothing more comes.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from hpckv.comm.group import Array, Group, Pending, Watch

LENGTH_TAG, BODY_TAG = 11, 12
_NO_MORE = -1


class Mailbox:
    """This rank's end towards the rank `peer` of `group`."""

    def __init__(self, group: Group, peer: int, watch: Watch) -> None:
        self._group, self._peer, self._watch = group, peer, watch
        self._sends: deque[Pending] = deque()
        self.is_ended = False
        """The other side has closed, and all of its messages were taken."""
        self._length = np.zeros(1, np.int64)
        self._body: Array | None = None
        self._pending = group.receive(self._length, peer, LENGTH_TAG)

    def post(self, message: bytes) -> None:
        """Hand a message over; it travels while this rank goes on."""
        self._send(len(message))
        if message:
            self._sends.append(self._group.send(np.frombuffer(message, np.uint8).copy(), self._peer, BODY_TAG))

    def close(self) -> None:
        """There will be no more messages from this side."""
        self._send(_NO_MORE)

    def poll(self) -> bytes | None:
        """The next message that is completely here; raises `RankLostError` if a rank of the run is known to be lost."""
        while self._sends and self._watch.is_done(self._sends[0]):
            self._sends.popleft()
        if self.is_ended or not self._watch.is_done(self._pending):
            return None
        if self._body is None:
            length = int(self._length[0])
            if length == _NO_MORE:
                self.is_ended = True
                return None
            self._body = np.zeros(length, np.uint8)
            if length:
                self._pending = self._group.receive(self._body, self._peer, BODY_TAG)
                if not self._watch.is_done(self._pending):
                    return None
        message, self._body = self._body.tobytes(), None
        self._length = np.zeros(1, np.int64)
        self._pending = self._group.receive(self._length, self._peer, LENGTH_TAG)
        return message

    def flush(self) -> None:
        """Wait until everything posted is on its way, or taken."""
        while self._sends:
            self._watch.wait(self._sends.popleft(), f"rank {self._peer} of {self._group.size} to take a message")

    def _send(self, length: int) -> None:
        self._sends.append(self._group.send(np.array([length], np.int64), self._peer, LENGTH_TAG))
