"""A model's folder on the node's own disk: copied once, verified, found again, and never in the way of a run."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from hpckv.errors import ModelError
from hpckv.model import stage
from hpckv.model.stage import stage_model, staged_model
from tests.cli.runs import chat_lines, hpckv, texts, write_run

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def model(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama", tokenizer=True), folder)
    return folder


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".complete"}


def test_the_copy_is_the_folder_and_is_used_again(model, disk):
    told = []
    copy = stage_model(model, str(disk), lambda done, total: told.append((done, total)))
    assert content(copy) == content(model)
    assert copy.stat().st_mode & 0o777 == 0o700
    assert told[-1][0] == told[-1][1] == sum(map(len, content(model).values()))
    del told[:]
    assert stage_model(model, str(disk), lambda done, total: told.append(done)) == copy
    assert told == []


def test_another_state_of_the_folder_is_another_copy(model, disk):
    first = stage_model(model, str(disk))
    os.utime(model / "config.json", (1, 1))
    assert stage_model(model, str(disk)) != first


def test_what_was_broken_off_is_copied_again(model, disk):
    copy = stage_model(model, str(disk))
    (copy / ".complete").unlink()
    (copy / "config.json").write_text("torn")
    assert stage_model(model, str(disk)) == copy
    assert content(copy) == content(model)


def test_a_disk_that_gives_back_something_else_is_not_used(model, disk, monkeypatch, caplog):
    sync = os.fsync

    def damage(fd: int) -> None:
        os.pwrite(fd, b"?", 0)
        sync(fd)

    monkeypatch.setattr("hpckv.model.stage.os.fsync", damage)
    assert stage_model(model, str(disk)) == model
    assert "read back as something else" in caplog.text


def test_without_room_the_oldest_copies_go_and_then_the_folder_itself_is_used(model, disk, monkeypatch, caplog):
    copy = stage_model(model, str(disk))
    os.utime(model / "config.json", (1, 1))
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))
    assert stage_model(model, str(disk)) == model
    assert not copy.exists()
    assert "it is read from where it is" in caplog.text


def test_a_copy_that_another_process_is_making_is_not_removed(model, disk, monkeypatch):
    copy = stage_model(model, str(disk))
    (copy / ".complete").unlink()
    with (copy.with_name(f"{copy.name}.lock")).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(model / "config.json", (1, 1))
        stage_model(model, str(disk))
        assert copy.exists()


def test_a_copy_that_is_used_is_not_removed_for_want_of_room(model, disk, monkeypatch):
    monkeypatch.setenv("HPCKV_LOCAL", str(disk))
    with staged_model(model) as copy:
        assert copy.is_relative_to(disk)
        os.utime(model / "config.json", (1, 1))
        monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))
        assert stage_model(model, str(disk)) == model
        assert (copy / "config.json").exists()
    assert stage_model(model, str(disk)) == model
    assert not copy.exists()


def test_who_uses_a_copy_keeps_nobody_from_using_it(model, disk, monkeypatch):
    monkeypatch.setenv("HPCKV_LOCAL", str(disk))
    with staged_model(model) as copy:
        assert stage_model(model) == copy != model
        with staged_model(model) as again:
            assert again == copy


@pytest.mark.mpi
def test_ranks_of_one_node_use_one_copy_together(model, disk, tmp_path):
    run_file = write_run(tmp_path, model, chat_lines(3))
    command = [
        Path(sys.executable).parent / "mpiexec",
        "-n",
        "2",
        sys.executable,
        "-m",
        "hpckv.cli.main",
        "run",
        run_file,
    ]
    environ = {**os.environ, "HPCKV_LOCAL": str(disk)}
    words = [*map(str, command), "--set", "parallel.pp=2", "--set", "model.stage=true"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(texts(tmp_path)) == 3
    assert len([path for path in disk.glob("hpckv-models-*/*") if path.is_dir()]) == 1


def test_processes_of_a_node_make_one_copy(model, disk):
    code = "import sys; from pathlib import Path; from hpckv.model.stage import stage_model, staged_model\n"
    code += "print(stage_model(Path(sys.argv[1]), sys.argv[2], lambda done, total: print('copied', file=sys.stderr)))"
    command = [sys.executable, "-c", code, str(model), str(disk)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    said = [job.communicate(timeout=60) for job in [subprocess.Popen(command, **pipes) for _ in range(4)]]
    assert len({out for out, _ in said}) == 1
    assert sum("copied" in err for _, err in said) == 1


def test_a_model_on_a_local_disk_is_not_copied_unless_a_place_is_named(model, disk, monkeypatch):
    monkeypatch.delenv("HPCKV_LOCAL", raising=False)
    assert stage_model(model) == model
    monkeypatch.setenv("HPCKV_LOCAL", str(disk))
    assert stage_model(model).is_relative_to(disk)


def test_a_folder_of_somebody_else_is_not_used(model, disk, caplog):
    (disk / f"hpckv-models-{os.getuid()}").mkdir(mode=0o777)
    (disk / f"hpckv-models-{os.getuid()}").chmod(0o777)
    assert stage_model(model, str(disk)) == model
    assert "not a folder of yours alone" in caplog.text


def test_a_folder_without_weights_is_refused(tmp_path, disk):
    with pytest.raises(ModelError, match="no safetensors"):
        stage_model(tmp_path, str(disk))


def test_a_run_from_the_copy_gives_the_same_answers(model, disk, tmp_path):
    run_file = write_run(tmp_path, model, chat_lines(4))
    assert hpckv("run", run_file).returncode == 0
    staged = {**os.environ, "HPCKV_LOCAL": str(disk)}
    done = hpckv("run", run_file, "--set", "model.stage=true", "--output", tmp_path / "staged", env=staged)
    assert done.returncode == 0, done.stderr
    assert "model copied to" in done.stderr
    assert texts(tmp_path) == texts(tmp_path, "staged")
    printed = hpckv("model", "stage", model, "--to", disk)
    assert printed.stdout.strip().startswith(str(disk))


def test_who_waits_for_the_copy_waits_for_its_end(model, disk, monkeypatch):
    slow = stage._copy

    def later(*given) -> None:
        time.sleep(0.3)
        slow(*given)

    monkeypatch.setattr(stage, "_copy", later)
    found = []
    threads = [threading.Thread(target=lambda: found.append(stage_model(model, str(disk)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert content(found[0]) == content(model)
