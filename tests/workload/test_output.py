"""The output file mends itself: torn tails, holes, repetitions; a full disk leaves no torn line."""

import json
import os
import time

import pytest

from hpckv.errors import CannotWriteError
from hpckv.store.durable import publish
from hpckv.workload.output import OutputFile, write_file
from hpckv.workload.run_lock import RunLock


def record(custom_id):
    return {"custom_id": custom_id, "response": {"text": "é\n" + custom_id}}


def ids(path):
    return [json.loads(raw)["custom_id"] for raw in path.read_bytes().splitlines()]


def written(path, *names):
    file = OutputFile(path)
    for name in names:
        file.append(record(name))
    file.close()


def test_lines_are_appended_and_found_again(tmp_path):
    path = tmp_path / "output.jsonl"
    written(path, "a", "b")
    written(path, "c")
    assert ids(path) == ["a", "b", "c"]
    assert OutputFile(path).done == {"a", "b", "c"}


def test_every_possible_torn_tail_is_cut_off(tmp_path):
    path = tmp_path / "output.jsonl"
    written(path, "a", "b")
    whole = path.read_bytes()
    first = len(whole.splitlines(keepends=True)[0])
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = ["a"] if length >= first else []
        assert OutputFile(path).done == set(kept)
        assert ids(path) == kept


@pytest.mark.parametrize(
    "middle", [b"\0" * 50 + b"\n", b'{"custom_id": "x"\n', b'{"custom_id":"a","response":{}}\n', b"\n"]
)
def test_a_spoilt_or_repeated_line_inside_is_cut_out(tmp_path, middle):
    path = tmp_path / "output.jsonl"
    written(path, "a", "b")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + middle + lines[1])
    assert OutputFile(path).done == {"a", "b"}
    assert path.read_bytes() == b"".join(lines)


def test_a_full_disk_leaves_whole_lines_only(tmp_path, monkeypatch):
    path = tmp_path / "output.jsonl"
    file = OutputFile(path)
    file.append(record("a"))
    real = os.write

    def half_then_full(fd, data):
        if len(data) > 10:
            return real(fd, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(CannotWriteError, match="No space left"):
        file.append(record("b"))
    monkeypatch.undo()
    assert ids(path) == ["a"]
    assert file.done == {"a"}


@pytest.mark.parametrize("names", [[], ["a"], ["a", "b"]])
def test_a_start_that_is_still_there_spoils_nothing_of_the_next_one(tmp_path, names, monkeypatch):
    path = tmp_path / "output.jsonl"
    zombie = OutputFile(path)
    for name in names:
        zombie.append(record(name))
    file = OutputFile(path)
    assert file.done == set(names)
    with pytest.raises(CannotWriteError, match="another start of this run has taken over"):
        zombie.append(record("b"))
    monkeypatch.setattr(os, "fstat", lambda fd, real=os.fstat: _with_a_name(real(fd)))  # as an NFS client may see it
    zombie.append(record("late"))
    with pytest.raises(CannotWriteError, match="another start of this run has taken over"):
        zombie.sync()
    with pytest.raises(CannotWriteError, match="another start of this run has taken over"):
        zombie.close()  # its last answers are not taken for kept ones
    monkeypatch.undo()
    file.append(record("c"))
    assert ids(path) == [*names, "c"]


def test_of_two_starts_at_the_same_moment_one_ends(tmp_path, monkeypatch):
    path = tmp_path / "output.jsonl"
    written(path, "a")

    def publish_then_another(*given, **more):
        own = publish(*given, **more)
        publish(*given, **more)
        return own

    monkeypatch.setattr("hpckv.workload.output.publish", publish_then_another)
    with pytest.raises(CannotWriteError, match="another start of this run has taken over"):
        OutputFile(path)
    assert ids(path) == ["a"]


def _with_a_name(found):
    """A file's status, whatever it is, of one that still has a name."""
    return os.stat_result((*found[:3], 1, *found[4:10]))


def test_a_run_directory_takes_one_process_at_a_time(tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(
        CannotWriteError, match=rf"process {os.getpid()} on .* is running there; wait for it, or end it"
    ):
        RunLock(tmp_path)
    lock.release()
    RunLock(tmp_path).release()


def test_a_job_that_was_requeued_passes_by_its_own_earlier_start_and_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lost = RunLock(tmp_path)  # its node is, to Slurm
    with pytest.raises(CannotWriteError, match="job 7 is running there"):
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = RunLock(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(CannotWriteError, match="job 7 is running there"):
        RunLock(tmp_path)
    lost.release()

    def try_it() -> str:
        try:
            RunLock(tmp_path).release()
        except CannotWriteError as error:
            return str(error)
        time.sleep(0.01)
        return ""

    end = time.monotonic() + 30
    while "is running there" not in try_it():  # from now on the second keeps others out
        assert time.monotonic() < end
    second.release()
    while try_it():  # a thread still has it for a moment
        assert time.monotonic() < end


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_files_of_a_run_keep_their_modes_and_get_those_that_the_user_wants(tmp_path, mode):
    path = tmp_path / "output.jsonl"
    for _ in range(2):
        before = os.umask(0o777 & ~mode)
        try:
            output = OutputFile(path)
            output.append(record(str(len(output.done))))
            output.close()
            write_file(tmp_path / "summary.json", "{}")
        finally:
            os.umask(before)
        assert {p.name: oct(p.stat().st_mode & 0o777) for p in tmp_path.glob("*.json*")} == {
            "output.jsonl": oct(mode),
            "summary.json": oct(mode),
        }
