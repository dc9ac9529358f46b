"""The conformance suite of the `Group` contract: every rank of a real launch calls `check_group`.

    mpiexec -n 3 python -c "from my_groups import world; from hpckv.testing.group_suite import check_group; check_group(world())"

A rank on which something is wrong raises `AssertionError`; the others then wait for it in vain and raise `RankLostError`: a launch
that does not conform never ends with 0.
"""

from __future__ import annotations

import time

import numpy as np

from hpckv.comm.group import Group, Pending, RankLostError, Watch
from hpckv.comm.mailbox import Mailbox

_DEADLINE_S = 30.0
_RECORD = np.dtype([("number", "<u4"), ("name", "S6"), ("pair", "<f4", (2,))])
_BIG = 300_001


def check_group(group: Group) -> None:
    """Every operation of the contract; raises on the first that does what it must not. All ranks must call it."""
    assert 0 <= group.rank < group.size
    watch = Watch(_DEADLINE_S)
    _check_broadcast(group, watch)
    _check_reductions(group, watch)
    _check_all_gather(group, watch)
    if group.size > 1:  # a group of one has nobody to send to
        _check_messages(group, watch)
        _check_mailboxes(group, watch)
        _check_a_wait_in_vain(group, watch)
    _check_many_at_once(group, watch)
    _check_split(group, watch)
    _check_groups_do_not_mix(group, watch)
    _gathered(group, watch, 0)  # nobody leaves while another still needs it
    assert not watch.is_broken


def _check_broadcast(group: Group, watch: Watch) -> None:
    number = np.array([17 if group.rank == 0 else -1], np.int32)
    watch.wait(group.broadcast(number), "a broadcast of one number")
    assert number.tolist() == [17]
    record = np.zeros(2, _RECORD)
    if group.rank == 0:
        record[1] = (4_000_000_000, b"node\xff", (0.5, -2.0))
    watch.wait(group.broadcast(record), "a broadcast of records")
    assert record["number"].tolist() == [0, 4_000_000_000]
    assert record["name"].tolist() == [b"", b"node\xff"]
    assert record["pair"].tolist() == [[0.0, 0.0], [0.5, -2.0]]
    wanted = np.arange(_BIG, dtype=np.uint8)
    big = wanted.copy() if group.rank == 0 else np.zeros(_BIG, np.uint8)
    watch.wait(group.broadcast(big), "a big broadcast")
    assert np.array_equal(big, wanted)


def _check_reductions(group: Group, watch: Watch) -> None:
    last = group.size - 1
    least = np.array([group.rank, -group.rank, 5, -(2**31) + group.rank, 2**31 - 1 - group.rank], np.int32)
    watch.wait(group.reduce_min(least), "a minimum")
    assert least.tolist() == [0, -last, 5, -(2**31), 2**31 - 1 - last]
    total = np.array([[group.rank, 1.0], [-0.5, -group.rank]], np.float32)
    watch.wait(group.reduce_sum(total), "a sum")
    ranks = last * group.size / 2
    assert total.tolist() == [[ranks, group.size], [-group.size / 2, -ranks]]
    big = np.full(_BIG, group.rank + 1, np.float32)
    watch.wait(group.reduce_sum(big), "a big sum")
    assert (big == ranks + group.size).all()


def _check_all_gather(group: Group, watch: Watch) -> None:
    small = np.zeros((group.size, 3), np.uint8)
    watch.wait(group.all_gather(np.array([group.rank, 255, 0], np.uint8), small), "every rank's bytes")
    assert small.tolist() == [[rank, 255, 0] for rank in range(group.size)]
    floats = np.zeros(group.size * _BIG, np.float32)
    watch.wait(group.all_gather(np.full(_BIG, group.rank - 0.5, np.float32), floats), "every rank's floats")
    assert np.array_equal(floats, np.repeat(np.arange(group.size, dtype=np.float32) - 0.5, _BIG))
    own, everybody = np.zeros(1, _RECORD), np.zeros(group.size, _RECORD)
    own[0] = (group.rank, f"r{group.rank}".encode(), (group.rank, -1.5))
    watch.wait(group.all_gather(own, everybody), "every rank's record")
    assert everybody["number"].tolist() == list(range(group.size))
    assert everybody["name"].tolist() == [f"r{rank}".encode() for rank in range(group.size)]
    assert everybody["pair"].tolist() == [[rank, -1.5] for rank in range(group.size)]


def _check_messages(group: Group, watch: Watch) -> None:
    """Round the ring, on two tags: each tag keeps its order, and neither waits for the other."""
    behind, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    ones = [np.zeros(4, np.int64) for _ in range(5)]
    two = np.zeros(_BIG, np.float32)
    # The other tag's message is sent last and asked for first.
    receives = [group.receive(two, before, 2), *(group.receive(one, before, 1) for one in ones)]
    sends = [group.send(np.array([group.rank, n, -n, 2**40], np.int64), behind, 1) for n in range(5)]
    sends.append(group.send(np.full(_BIG, group.rank, np.float32), behind, 2))
    for pending in [*receives, *sends]:
        watch.wait(pending, "a neighbour in the ring")
    assert [one.tolist() for one in ones] == [[before, n, -n, 2**40] for n in range(5)]
    assert (two == before).all()
    assert all(pending.is_done() for pending in [*sends, *receives])  # may be asked again


def _check_mailboxes(group: Group, watch: Watch) -> None:
    """Rank 0 and every other one: messages of any length in both directions at once, in order, until both have closed."""
    peers = range(1, group.size) if group.rank == 0 else [0]
    boxes = {peer: Mailbox(group, peer, watch) for peer in peers}
    for peer, box in boxes.items():
        for length in (0, 1, _BIG, 0, 7):
            box.post(bytes([group.rank, peer]) * length)
        box.close()
    heard: dict[int, list[bytes]] = {peer: [] for peer in peers}
    deadline = time.monotonic() + _DEADLINE_S
    while not all(box.is_ended for box in boxes.values()):
        assert time.monotonic() < deadline
        for peer, box in boxes.items():
            while (message := box.poll()) is not None:
                heard[peer].append(message)
    for peer, box in boxes.items():
        assert heard[peer] == [bytes([peer, group.rank]) * length for length in (0, 1, _BIG, 0, 7)]
        assert box.poll() is None
        box.flush()


def _check_a_wait_in_vain(group: Group, watch: Watch) -> None:
    """A wait that fails ends no operation: rank 0 asks the last rank for what it will only send when it is told to."""
    last = group.size - 1
    answer, word = np.zeros(3, np.uint8), np.zeros(1, np.uint8)
    if group.rank == 0:
        pending = group.receive(answer, last, 7)
        hasty = Watch(0.05)
        said = ""
        try:
            hasty.wait(pending, "the last rank")
        except RankLostError as error:
            said = str(error)
        assert said == "no answer in 0.05 s: the last rank"
        assert hasty.is_broken
        assert not pending.is_done()
        watch.wait(group.send(word, last, 8), "the last rank to listen")
        watch.wait(pending, "the last rank")
        assert answer.tolist() == [1, 2, 3]
    elif group.rank == last:
        watch.wait(group.receive(word, 0, 8), "rank 0 to ask")
        watch.wait(group.send(np.array([1, 2, 3], np.uint8), 0, 7), "rank 0 to listen")


def _check_many_at_once(group: Group, watch: Watch) -> None:
    """Started in one order on every rank, waited for in the opposite one."""
    numbers = [np.array([n if group.rank == 0 else -1], np.int32) for n in range(6)]
    under_way: list[Pending] = [group.broadcast(number) for number in numbers]
    least, total = np.array([-group.rank], np.int32), np.array([2.5], np.float32)
    whole = np.zeros(group.size, np.uint8)
    under_way += [group.reduce_min(least), group.reduce_sum(total)]
    under_way.append(group.all_gather(np.array([group.rank], np.uint8), whole))
    for pending in reversed(under_way):
        watch.wait(pending, "one of many")
    assert [number[0] for number in numbers] == [0, 1, 2, 3, 4, 5]
    assert (least[0], total[0]) == (1 - group.size, 2.5 * group.size)
    assert whole.tolist() == list(range(group.size))


def _check_split(group: Group, watch: Watch) -> None:
    halves = group.split(group.rank % 2)
    members = list(range(group.rank % 2, group.size, 2))
    assert (halves.rank, halves.size) == (members.index(group.rank), len(members))
    assert _gathered(halves, watch, group.rank) == members
    number = np.array([group.rank + 10], np.int32)
    watch.wait(halves.broadcast(number), "a broadcast in a part")
    assert number[0] == members[0] + 10  # the part's rank 0, not the group's
    if halves.size > 1:
        word = np.array([group.rank], np.int32)
        if halves.rank == 0:
            watch.wait(halves.send(word, 1, 0), "rank 1 of a part")
        elif halves.rank == 1:
            watch.wait(halves.receive(word, 0, 0), "rank 0 of a part")
            assert word[0] == members[0]
    alone = group.split(group.size - group.rank)
    assert (alone.rank, alone.size, _gathered(alone, watch, group.rank)) == (0, 1, [group.rank])
    again = halves.split(0)
    assert (again.rank, again.size, _gathered(again, watch, group.rank)) == (halves.rank, halves.size, members)


def _check_groups_do_not_mix(group: Group, watch: Watch) -> None:
    """Ranks need not start operations of different groups in the same order."""
    same = group.split(0)
    assert (same.rank, same.size) == (group.rank, group.size)
    one, two = np.array([group.rank], np.int32), np.array([group.rank + 100], np.int32)
    started = [group, same] if group.rank % 2 else [same, group]
    under_way = [part.reduce_min(one if part is group else two) for part in started]
    for pending in under_way:
        watch.wait(pending, "two groups at once")
    assert (one[0], two[0]) == (0, 100)
    if group.size > 1 and group.rank == 0:
        sends = [part.send(np.array([n], np.int32), 1, 3) for n, part in enumerate([group, same])]
        for pending in sends:
            watch.wait(pending, "rank 1 of two groups")
    elif group.rank == 1:
        found = []
        for part in (same, group):  # the later message is taken first
            word = np.array([-1], np.int32)
            receive = part.receive(word, 0, 3)
            watch.wait(receive, "rank 0 of two groups")
            found.append(int(word[0]))
        assert found == [1, 0]


def _gathered(group: Group, watch: Watch, value: int) -> list[int]:
    whole = np.zeros(group.size, np.int32)
    watch.wait(group.all_gather(np.array([value], np.int32), whole), "every rank of a part")
    found: list[int] = whole.tolist()
    return found
