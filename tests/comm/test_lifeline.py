"""Who of a run is gone, hangs or has failed is known to every other rank, in the same words; strangers are not heard."""

import fcntl
import json
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from hpckv.comm import lifeline
from hpckv.comm.group import RankLostError
from hpckv.comm.lifeline import SECRET_BYTES, Lifeline, Listener, Member, _Line, connect
from hpckv.errors import InputError
from tests.parallel.ranks import TOP

MEMBERS = [Member(n, f"node{n}", 100 + n) for n in range(3)]


def start(*behaviours: str) -> list[subprocess.Popen]:
    """A run whose ranks behave like this."""
    command = [sys.executable, "-m", "tests.comm.lifeline_program"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": TOP}
    ranks = [
        subprocess.Popen([*command, str(rank), str(len(behaviours)), behaviour], **pipes)
        for rank, behaviour in enumerate(behaviours)
    ]
    address = ranks[0].stdout.readline()
    for rank in ranks[1:]:
        rank.stdin.write(address)
        rank.stdin.flush()
    return ranks


def end_of(*behaviours: str) -> list[tuple[int, str]]:
    """Exit codes and last words of such a run."""
    ranks = start(*behaviours)
    said = {n: ranks[n].communicate(timeout=60) for n, behaviour in enumerate(behaviours) if behaviour != "hang"}
    for number in set(range(len(ranks))) - set(said):  # what hangs, once everybody else is gone
        ranks[number].kill()
        said[number] = ranks[number].communicate()
    return [(rank.returncode, "".join(said[number]).strip()) for number, rank in enumerate(ranks)]


def test_a_rank_that_is_killed_is_named_on_all_others():
    lost = "rank 2 on node2 (pid 102, logs/rank-2.log) is gone: it was killed, or its node is down"
    assert end_of("follow", "follow", "die", "follow") == [(75, lost), (75, lost), (-9, ""), (75, lost)]


def test_rank_0_being_killed_is_noticed_by_all_others():
    lost = "rank 0 on node0 (pid 100) is gone: it was killed, or its node is down"
    assert end_of("die", "follow", "follow") == [(-9, ""), (75, lost), (75, lost)]


def test_a_rank_that_hangs_is_noticed_by_its_silence():
    lost = "rank 1 on node1 (pid 101, logs/rank-1.log) has said nothing for 2 s: it hangs, or its node is gone"
    assert end_of("follow", "hang", "follow") == [(75, lost), (-9, ""), (75, lost)]


def test_an_error_reaches_all_others_with_its_exit_code():
    told = "rank 1 on node1 (pid 101, logs/rank-1.log): the weights are torn"
    assert end_of("follow", "fail", "follow", "follow") == [
        (69, told),
        (69, "the weights are torn"),
        (69, told),
        (69, told),
    ]


def test_an_error_of_rank_0_reaches_all_others():
    told = "rank 0 on node0 (pid 100): the weights are torn"
    assert end_of("fail", "follow", "follow") == [(69, "the weights are torn"), (69, told), (69, told)]


def test_an_error_that_nobody_foresaw_is_named_by_its_kind():
    told = "rank 1 on node1 (pid 101, logs/rank-1.log): ValueError: no such thing"
    assert end_of("follow", "crash") == [(70, told), (70, "no such thing")]


def test_a_rank_that_is_stuck_when_another_is_lost_is_ended():
    lost = "rank 1 on node1 (pid 101, logs/rank-1.log) is gone: it was killed, or its node is down"
    stuck = f"{lost}; this rank is stuck as well and ends now"
    assert end_of("hang in C", "die", "hang in C") == [(75, stuck), (-9, ""), (75, stuck)]


def test_a_goodbye_is_not_trouble_and_a_death_after_it_is():
    assert end_of("follow", "leave", "leave") == [(0, "over"), (0, "over"), (0, "over")]
    lost = "rank 2 on node2 (pid 102, logs/rank-2.log) is gone: it was killed, or its node is down"
    assert end_of("follow", "leave", "die") == [(75, lost), (0, "over"), (-9, "")]


def test_nobody_minds_that_rank_0_goes_after_its_goodbye():
    assert end_of("leave", "follow", "follow") == [(0, "over"), (0, "over"), (0, "over")]


def test_a_job_that_is_suspended_as_a_whole_goes_on_where_it_was():
    """As Slurm does with gang scheduling: what was silent is this process, not the others."""
    ranks = start("stay", "stay", "stay")
    assert [rank.stdout.readline() for rank in ranks] == ["here\n"] * 3
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    time.sleep(3.0)  # longer than the 2 s after which silence counts
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    time.sleep(1.0)
    for rank in ranks:
        rank.stdin.close()
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0, 0]
    assert [rank.stdout.read() for rank in ranks] == ["over\n"] * 3
    for rank in ranks:
        rank.stdout.close()
        rank.stderr.close()


class Peer:
    """Another rank by hand: says what it is told to, and nothing else."""

    def __init__(self, listener: Listener, hello: bytes) -> None:
        self.socket = socket.create_connection(listener.address, timeout=30)
        self.socket.sendall(hello)

    def say(self, **frame) -> None:
        self.socket.sendall(json.dumps(frame).encode() + b"\n")

    def beat(self) -> None:
        self.socket.sendall(b"\n")

    @property
    def is_refused(self) -> bool:
        """Waits for the other side to hang up."""
        with suppress(ConnectionResetError):
            while self.socket.recv(100):
                pass
        return True


def hello(listener: Listener, rank: int) -> bytes:
    return listener.secret + rank.to_bytes(4, "little")


class Harbour:
    """Lifelines and peers of one process; all of them are gone at the end."""

    def __init__(self) -> None:
        self.listener = Listener("127.0.0.1")
        self._lifelines: list[Lifeline] = []
        self._sockets = [self.listener._socket]

    def peer(self, hello: bytes) -> Peer:
        found = Peer(self.listener, hello)
        self._sockets.append(found.socket)
        return found

    def accept(self, members=MEMBERS, deadline_s=30.0, silence_s=10.0) -> Lifeline:
        return self.keep(self.listener.accept(list(members), deadline_s, silence_s))

    def connect(self, rank: int, silence_s=10.0) -> Lifeline:
        return self.keep(connect(rank, MEMBERS[0], self.listener.address, self.listener.secret, 30.0, silence_s))

    def keep(self, found: Lifeline) -> Lifeline:
        self._lifelines.append(found)
        self._sockets += [line.socket for line in found._lines]
        return found

    def close(self) -> None:
        for found in self._lifelines:
            found._is_noted.set()
            found.close()
        for each in self._sockets:
            if each.fileno() >= 0 and each is not self.listener._socket:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        for found in self._lifelines:
            found._thread.join()
        for each in self._sockets:
            each.close()


@pytest.fixture
def harbour(monkeypatch):
    monkeypatch.setattr(lifeline, "BEAT_S", 0.1)
    found = Harbour()
    yield found
    found.close()


def trouble_of(found: Lifeline) -> RankLostError:
    wait_until(lambda: found._trouble)
    with pytest.raises(RankLostError) as caught:
        found.check()
    return caught.value


def wait_until(condition) -> None:
    while not condition():
        time.sleep(0.01)


def test_strangers_are_refused_and_do_not_count_as_ranks(harbour):
    listener = harbour.listener
    strangers = [
        harbour.peer(bytes(SECRET_BYTES) + (1).to_bytes(4, "little")),  # would be rank 1, with a wrong secret
        harbour.peer(b"GET / HTTP/1.1\r\nHost: node0\r\n\r\n"),
        harbour.peer(listener.secret),  # and no rank
        harbour.peer(b""),
        harbour.peer(hello(listener, 0)),
        harbour.peer(hello(listener, 7)),
    ]
    with pytest.raises(RankLostError, match=r"^no connection in 1 s from rank 1 on node1 \(pid 101\), rank 2 on node2"):
        harbour.accept(deadline_s=1.0)
    assert all(stranger.is_refused for stranger in strangers)


def test_after_strangers_the_ranks_are_still_let_in_once_each(harbour):
    stranger = harbour.peer(bytes(SECRET_BYTES) + (2).to_bytes(4, "little"))
    first = harbour.peer(hello(harbour.listener, 2))
    second = harbour.peer(hello(harbour.listener, 2))
    other = harbour.peer(hello(harbour.listener, 1))
    root = harbour.accept()
    assert stranger.is_refused
    assert second.is_refused
    other.beat()
    first.say(error="I am rank 2", exit_code=65, rank=2)
    error = trouble_of(root)
    assert (str(error), error.exit_code) == ("rank 2 on node2 (pid 102): I am rank 2", 65)


def test_the_secret_is_another_one_every_time():
    one, two = Listener("127.0.0.1"), Listener("127.0.0.1")
    assert one.secret != two.secret
    assert len(one.secret) == SECRET_BYTES
    assert one.address != two.address
    one._socket.close()
    two._socket.close()


def test_a_root_that_is_not_there_is_named(harbour):
    harbour.listener._socket.close()
    with pytest.raises(RankLostError, match=r"^rank 0 on node0 \(pid 100\) cannot be reached at 127\.0\.0\.1:"):
        harbour.connect(1)


def test_a_connection_that_falls_silent_is_noticed_and_one_that_beats_is_not(harbour):
    alive, silent = (harbour.peer(hello(harbour.listener, rank)) for rank in (1, 2))
    root = harbour.accept(silence_s=1.0)
    silent.beat()
    wait_until(lambda: alive.beat() or root._trouble)
    assert str(trouble_of(root)).startswith("rank 2 on node2 (pid 102) has said nothing for 1 s")


def test_while_rank_0_still_waits_for_others_it_does_not_seem_to_hang(harbour):
    one = harbour.connect(1, silence_s=1.0)
    with ThreadPoolExecutor(1) as thread:
        accepting = thread.submit(harbour.accept)
        time.sleep(2.0)
        two = harbour.connect(2, silence_s=1.0)
        root = accepting.result()
    two.ask_for_drain()
    wait_until(lambda: root.wants_drain)
    one.check()


def test_after_its_goodbye_a_rank_may_be_silent(harbour):
    leaving, other = (harbour.peer(hello(harbour.listener, rank)) for rank in (1, 2))
    root = harbour.accept(silence_s=0.5)
    leaving.say(goodbye=True)
    for _ in range(20):
        other.beat()
        time.sleep(0.05)
    assert str(trouble_of(root)).startswith("rank 2")


def test_frames_may_come_in_pieces_and_several_at_once(harbour):
    one, two = (harbour.peer(hello(harbour.listener, rank)) for rank in (1, 2))
    root = harbour.accept()
    one.socket.sendall(b'\n\n{"goodbye": true}\n{"dra')
    two.beat()
    wait_until(lambda: root._lines[0].said_goodbye)
    assert not root.wants_drain
    one.socket.sendall(b'in": true}\n')
    wait_until(lambda: root.wants_drain)
    root.check()


def test_a_rank_that_is_asked_to_stop_tells_rank_0_and_is_no_trouble(harbour):
    one, two, root = harbour.connect(1), harbour.connect(2), harbour.accept()
    one.ask_for_drain()
    wait_until(lambda: root.wants_drain)
    assert not two.wants_drain
    root.ask_for_drain()
    wait_until(lambda: two.wants_drain)
    for each in (root, one, two):
        each.check()


def test_the_first_error_is_the_one_that_counts(harbour):
    one, two, root = harbour.connect(1), harbour.connect(2), harbour.accept()
    one.report(InputError("line 3 is no JSON"))
    first = "rank 1 on node1 (pid 101): line 3 is no JSON"
    assert [str(trouble_of(each)) for each in (root, two)] == [first, first]
    two.report(InputError("line 9 is no JSON either"))  # its own end follows from the first: nobody is told
    root.report(RankLostError(first))
    error = trouble_of(root)
    assert (str(error), error.exit_code) == (first, 65)
    one.check()


def test_a_process_with_many_open_files_hears_as_well(harbour):
    peer = harbour.peer(b"")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(2000, limits[0]), limits[1]))
    sock, _ = harbour.listener._socket.accept()
    number = fcntl.fcntl(sock, fcntl.F_DUPFD, 1500)
    sock.close()
    root = harbour.keep(Lifeline(0, [_Line(socket.socket(fileno=number), MEMBERS[1])], 10.0))
    peer.say(drain=True)
    wait_until(lambda: root.wants_drain or not root._thread.is_alive())
    assert root.wants_drain
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_alone_there_is_nobody_to_lose():
    alone = Lifeline.single()
    alone._thread.join()
    alone.check()
    alone.report(InputError("line 3 is no JSON"))
    alone.ask_for_drain()
    alone.wait_for_root(30.0)
    alone.close()
    assert alone.wants_drain
