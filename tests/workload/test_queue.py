"""Jobs that share a run's queue, without an engine: who takes what, who is dead, and that nothing is lost or done for nothing."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hpckv.workload.heart import Heart
from hpckv.workload.queue import MERGE, Item, QueuePlan, Worker, WorkQueue, newest_round, open_parts

LEASE_S = 0.4


def plan(count: int = 8, tokens: int = 100) -> QueuePlan:
    return QueuePlan("digest", 1000, [Item(f"{n:05d}", [f"r{n}a", f"r{n}b"], [10, 5], tokens) for n in range(count)])


def queue(folder: Path, name: str, *, job: str | None = None, restart: int = 0, tokens: int = 1000) -> WorkQueue:
    found = WorkQueue(folder, Worker(name, "host", job, restart, tokens), LEASE_S)
    found.publish_plan(plan())
    found.show()
    return found


def answer(worker: WorkQueue, *ids: str) -> None:
    with worker.part.open("a") as file:
        for custom_id in ids:
            file.write(f'{{"custom_id":"{custom_id}"}}\n')


def test_the_first_plan_counts(tmp_path):
    first = queue(tmp_path, "a")
    other = WorkQueue(tmp_path, Worker("b", "host", None, 0), LEASE_S)
    assert other.publish_plan(plan(3)) == first.plan


def test_workers_begin_far_apart_and_go_on_with_neighbours(tmp_path):
    a, b = queue(tmp_path, "a"), queue(tmp_path, "b")
    taken = []
    for worker in (a, b, a, b, a, b):
        view = worker.look()
        name = worker.next_free(view)
        worker.claim(name, view)
        taken.append(int(name))
    assert taken[::2] == [0, 1, 2]
    assert taken[1::2] == [4, 5, 6]


def test_an_item_has_one_holder(tmp_path):
    a, b = queue(tmp_path, "a"), queue(tmp_path, "b")
    before = b.look()
    assert a.claim("00003", a.look()).ids == ["r3a", "r3b"]
    assert b.claim("00003", before) is None
    assert not b.look().is_free("00003")


def test_an_item_that_needs_more_than_a_gpu_has_is_left_to_others(tmp_path):
    small, large = queue(tmp_path, "small", tokens=99), queue(tmp_path, "large", tokens=100)
    assert small.next_free(small.look()) is None
    assert large.next_free(large.look()) == "00000"


def test_the_work_of_a_worker_without_signs_of_life_is_taken_over_without_what_it_answered(tmp_path):
    a, b = queue(tmp_path, "a"), queue(tmp_path, "b")
    a.claim("00000", a.look())
    answer(a, "r0a")
    assert not b.look().is_free("00000")
    time.sleep(LEASE_S * 1.5)
    view = b.look()
    assert view.is_free("00000")
    assert b.claim("00000", view).ids == ["r0b"]
    assert a.look().claims["00000"] == (1, "b")


def test_as_long_as_it_shows_itself_a_worker_keeps_its_work(tmp_path):
    a, b = queue(tmp_path, "a"), queue(tmp_path, "b")
    a.claim("00000", a.look())
    for _ in range(8):
        time.sleep(LEASE_S / 4)
        a.show()
        assert not b.look().is_free("00000")


def test_who_has_left_is_not_waited_for(tmp_path):
    a, b = queue(tmp_path, "a"), queue(tmp_path, "b")
    a.claim("00000", a.look())
    heart = Heart(a, LEASE_S)
    heart.stop()
    assert b.look().is_free("00000")


def test_an_earlier_start_of_a_job_that_was_started_again_is_dead(tmp_path):
    before, other = queue(tmp_path, "7.0.x", job="7"), queue(tmp_path, "8.0.y", job="8")
    before.claim("00000", before.look())
    assert not other.look().is_free("00000")
    queue(tmp_path, "7.1.z", job="7", restart=1)
    before.show()  # on a node that lost its network it goes on
    assert other.look().is_free("00000")


def test_a_worker_of_last_week_is_not_waited_for(tmp_path):
    a = queue(tmp_path, "a")
    a.claim("00000", a.look())
    old = time.time() - 7 * 86400
    os.utime(tmp_path / "workers" / "a.json", (old, old))
    b = queue(tmp_path, "b")
    assert b.look().is_free("00000")


def test_what_is_given_back_is_taken_by_another_and_not_by_who_takes_the_rest_over(tmp_path):
    a, b, c = (queue(tmp_path, name) for name in "abc")
    item = a.claim("00002", a.look())
    a.give(item, ["r2b"])
    view = b.look()
    (piece,) = (name for name, found in view.items.items() if found.of == "00002")
    assert list(view.items).index(piece) == list(view.items).index("00002") + 1
    found = b.claim(piece, view)
    assert (found.ids, found.costs) == (["r2b"], [5])
    time.sleep(LEASE_S * 1.5)
    b.show()
    view = c.look()
    assert c.claim("00002", view).ids == ["r2a"]
    assert not view.is_free(piece) or "b" not in view.alive


def test_a_heart_stops_when_the_engine_does_not_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("hpckv.workload.heart._STUCK", 0.5)
    a, b = queue(tmp_path, "a"), queue(tmp_path, "b")
    a.claim("00000", a.look())
    heart = Heart(a, LEASE_S)
    b.look()
    time.sleep(LEASE_S * 2.5)
    b.look()
    time.sleep(LEASE_S * 1.2)
    assert b.look().is_free("00000")
    heart.stop()


def test_after_a_round_comes_the_next(tmp_path):
    first = newest_round(tmp_path)
    assert first == tmp_path / "queue" / "1"
    worker = queue(first, "a")
    answer(worker, "r0a")
    assert open_parts(tmp_path) == [worker.part]
    worker.finish(MERGE)
    worker.clean()
    assert newest_round(tmp_path) == tmp_path / "queue" / "2"
    assert open_parts(tmp_path) == []
    assert worker.claim("00000", worker.look()) is None


class Jobs(RuleBasedStateMachine):
    """Any number of workers come, take, answer, give, die and rise from the dead, in any order."""

    @initialize(folder=st.builds(lambda: None))
    def begin(self, folder):
        import tempfile

        self.folder = Path(tempfile.mkdtemp(prefix="hpckv-queue-"))
        self.workers: list[WorkQueue] = []
        self.dead: set[str] = set()
        self.held: dict[str, dict[str, list[str]]] = {}
        self.join()

    @rule()
    def join(self):
        name = f"w{len(self.workers)}"
        worker = WorkQueue(self.folder, Worker(name, "host", None, 0, 1000), 1e9)
        worker.publish_plan(plan(4))
        worker.show()
        self.workers.append(worker)
        self.held[name] = {}

    def view(self, worker):
        view = worker.look()
        view.alive = {name: found for name, found in view.alive.items() if name not in self.dead}
        return view

    @rule(n=st.integers(0, 99))
    def take(self, n):
        worker = self.workers[n % len(self.workers)]
        view = self.view(worker)
        if name := worker.next_free(view):
            item = worker.claim(name, view)
            self.held[worker.worker.name][name] = list(item.ids)

    @rule(n=st.integers(0, 99))
    def answer_one(self, n):
        worker = self.workers[n % len(self.workers)]
        for name, ids in list(self.held[worker.worker.name].items()):
            if ids:
                answer(worker, ids.pop(0))
            if not ids:
                worker.finish(name)
                del self.held[worker.worker.name][name]
            return

    @rule(n=st.integers(0, 99))
    def give_half(self, n):
        worker = self.workers[n % len(self.workers)]
        for name, ids in self.held[worker.worker.name].items():
            if len(ids) > 1:
                worker.give(self.view(worker).items[name], [ids.pop()])
            return

    @rule(n=st.integers(0, 99))
    def die(self, n):
        """As the others see it; it may go on all the same."""
        self.dead.add(self.workers[n % len(self.workers)].worker.name)

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "folder"):
            return
        answered = {line for path in self.folder.glob("parts/*.jsonl") for line in path.read_text().split("\n") if line}
        view = self.view(self.workers[0])
        open_ids = {custom_id for item in view.left for custom_id in item.ids}
        for custom_id in self.workers[0].plan.ids:
            assert f'{{"custom_id":"{custom_id}"}}' in answered or custom_id in open_ids

    def teardown(self):
        import shutil

        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


TestJobs = Jobs.TestCase
TestJobs.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_items_are_taken_once(tmp_path, count):
    workers = [queue(tmp_path, f"w{n}") for n in range(count)]
    taken = []
    while any(
        (name := worker.next_free(view := worker.look())) and taken.append(worker.claim(name, view).name) is None
        for worker in workers
    ):
        pass
    assert sorted(taken) == [f"{n:05d}" for n in range(8)]
