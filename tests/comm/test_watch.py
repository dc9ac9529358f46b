"""Waiting: a deadline ends it and says for what, so does bad news, and signals are handled meanwhile."""

import os
import signal
import threading

import pytest

from hpckv.comm import group
from hpckv.comm.group import Done, Pending, RankLostError, Watch
from hpckv.errors import ModelError


class DoneWhen(Pending):
    """Done as soon as there are so many entries in a list."""

    def __init__(self, entries: list, count: int = 1) -> None:
        self.entries, self.count = entries, count

    def is_done(self) -> bool:
        return len(self.entries) >= self.count


NEVER = DoneWhen([])


class Broken(Pending):
    def is_done(self) -> bool:
        raise RankLostError("a connection between ranks broke")


@pytest.fixture
def signalled():
    """signalled(handler): it is called in 50 ms, by a signal."""
    before = signal.getsignal(signal.SIGUSR1)
    timer = threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGUSR1])

    def start(handler) -> None:
        signal.signal(signal.SIGUSR1, lambda number, frame: handler())
        timer.start()

    yield start
    timer.join()
    signal.signal(signal.SIGUSR1, before)


def test_a_deadline_names_what_was_waited_for_and_asks_for_a_restart():
    watch = Watch(0.05)
    with pytest.raises(RankLostError, match=r"^no answer in 0\.05 s: the stream of stage 3$") as caught:
        watch.wait(NEVER, "the stream of stage 3")
    assert caught.value.exit_code == 75
    assert watch.is_broken


def test_a_deadline_may_be_changed_between_waits():
    watch = Watch(3600.0)
    watch.deadline_s = 0.0
    with pytest.raises(RankLostError, match="no answer in 0 s: a step"):
        watch.wait(NEVER, "a step")


def test_what_is_done_costs_nothing_even_without_time():
    watch = Watch(0.0)
    watch.wait(Done(), "nothing")
    assert (watch.waited_s, watch.is_broken) == (0.0, False)


def test_news_are_looked_for_again_and_again_until_it_is_done():
    looks: list[int] = []
    watch = Watch(3600.0, lambda: looks.append(1))
    watch.wait(DoneWhen(looks, count=5), "five looks")
    assert len(looks) == 5
    assert watch.waited_s > 0
    assert not watch.is_broken


class Clock:
    """Half a second from look to look, but an hour before the third one."""

    def __init__(self) -> None:
        self.times = iter([0.0, 0.5, *(3600 + n / 2 for n in range(100))])

    def perf_counter(self) -> float:
        return next(self.times)

    def monotonic(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        pass


def test_time_in_which_the_process_itself_was_stopped_does_not_count(monkeypatch):
    monkeypatch.setattr(group, "time", Clock())
    looks: list[int] = []
    watch = Watch(10.0, lambda: looks.append(1))
    with pytest.raises(RankLostError, match="no answer in 10 s: a rank that was stopped too"):
        watch.wait(NEVER, "a rank that was stopped too")
    assert len(looks) == 22


def test_bad_news_end_the_wait_with_their_own_exit_code():
    def check() -> None:
        error = RankLostError("rank 2 on n7 (pid 12): the weights are torn")
        error.exit_code = ModelError.exit_code
        raise error

    watch = Watch(3600.0, check)
    with pytest.raises(RankLostError, match="rank 2 on n7") as caught:
        watch.wait(NEVER, "rank 2")
    assert caught.value.exit_code == 69
    assert watch.is_broken


def test_a_broken_operation_breaks_the_watch():
    watch = Watch(3600.0)
    with pytest.raises(RankLostError, match="a connection between ranks broke"):
        watch.wait(Broken(), "rank 1")
    assert watch.is_broken


def test_a_signal_handler_runs_while_waiting(signalled):
    entries: list[str] = []
    signalled(lambda: entries.append("signal"))
    watch = Watch(3600.0)
    watch.wait(DoneWhen(entries), "a signal")
    assert entries == ["signal"]
    assert not watch.is_broken


def test_a_signal_handler_that_raises_ends_the_wait(signalled):
    def interrupt() -> None:
        raise KeyboardInterrupt

    signalled(interrupt)
    watch = Watch(3600.0)
    with pytest.raises(KeyboardInterrupt):
        watch.wait(NEVER, "a signal")
    assert watch.is_broken
