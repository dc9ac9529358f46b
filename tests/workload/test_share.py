"""Several workers share one run in one process: whatever they give, lose and take over, each request is answered."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from hpckv.workload.queue import Item, QueuePlan, Worker, WorkQueue
from hpckv.workload.share import Share

MOST = 8
RUNNING = 2
NUM_ITEMS = 6


class Computer:
    """Runs two requests at once, in the order in which they came, and answers one a step."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.unstarted: list[str] = []

    @property
    def num_unfinished(self) -> int:
        return len(self.running) + len(self.unstarted)

    def withdraw(self, request_ids):
        for custom_id in request_ids:
            self.unstarted.remove(custom_id)

    def step(self) -> list[str]:
        while self.unstarted and len(self.running) < RUNNING:
            self.running.append(self.unstarted.pop(0))
        return [self.running.pop(0)] if self.running else []


class OneWorker:
    def __init__(self, folder: Path, name: str) -> None:
        self.queue = WorkQueue(folder, Worker(name, "host", None, 0, 1000), 1e9)
        items = [Item(f"{n:05d}", [f"r{n}-{i}" for i in range(4)], [1] * 4, 100) for n in range(NUM_ITEMS)]
        self.queue.publish_plan(QueuePlan("digest", 1000, items))
        self.queue.show()
        self.computer = Computer()
        self.share = Share(self.queue, self.computer, self.computer.unstarted.append)
        self.taken_for_dead: set[str] = set()

    def turn(self) -> None:
        """What a worker does between two steps of its engine, and the step."""
        view = self.queue.look()
        view.alive = {name: worker for name, worker in view.alive.items() if name not in self.taken_for_dead}
        self.share.drop_what_others_do(view)
        self.share.give(view)
        is_idle = not self.share.fill(view, MOST) and not self.computer.num_unfinished
        if is_idle != self.queue.worker.is_idle:
            self.queue.worker.is_idle = is_idle
            self.queue.show()
        for custom_id in self.computer.step():
            with self.queue.part.open("a") as file:
                file.write(f'{{"custom_id":"{custom_id}"}}\n')
            self.share.answered(custom_id)
        self.share.finish(lambda: None)


class Workers(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="hpckv-share-"))
        self.workers: list[OneWorker] = []
        self.join()

    @rule()
    def join(self):
        if len(self.workers) < 4:
            self.workers.append(OneWorker(self.folder, f"w{len(self.workers)}"))

    @rule(n=st.integers(0, 3), turns=st.integers(1, 6))
    def work(self, n, turns):
        for _ in range(turns):
            self.workers[n % len(self.workers)].turn()

    @rule(n=st.integers(0, 3), by=st.integers(0, 3))
    def is_taken_for_dead(self, n, by):
        """It goes on all the same."""
        a, b = self.workers[n % len(self.workers)], self.workers[by % len(self.workers)]
        if a is not b:
            b.taken_for_dead.add(a.queue.worker.name)

    def teardown(self):
        for _ in range(200):
            if not self.workers[0].queue.look().left:
                break
            for worker in self.workers:
                worker.taken_for_dead.clear()
                worker.turn()
        try:
            assert not self.workers[0].queue.look().left
            parts = [path.read_text().splitlines() for path in self.folder.glob("parts/*.jsonl")]
            assert {f'{{"custom_id":"r{n}-{i}"}}' for n in range(NUM_ITEMS) for i in range(4)} == set().union(*parts)
            assert all(len(set(lines)) == len(lines) for lines in parts)
            for worker in self.workers:
                worker.turn()
                assert not worker.computer.unstarted
        finally:
            shutil.rmtree(self.folder)


TestWorkers = Workers.TestCase
TestWorkers.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_half_of_what_has_not_been_started_goes_to_one_that_has_nothing_although_it_is_of_several_items(tmp_path):
    busy, late = OneWorker(tmp_path, "busy"), OneWorker(tmp_path, "late")
    busy.share.fill(busy.queue.look(), NUM_ITEMS * 4)
    busy.computer.step()
    late.turn()
    busy.share.give(busy.queue.look())
    pieces = [item for item in late.queue.look().items.values() if item.of]
    assert [len(piece.ids) for piece in pieces] == [3, 4, 4]
    assert busy.computer.num_unfinished == 24 - 1 - 11
