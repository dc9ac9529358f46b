"""A job on a node whose disk is full, and with a store that is: all answers are there and exact, and the log says what was missing.

A full output is in `test_interruptions.py`, a store that fills at any moment in `tests/store/test_full_disk.py`.
"""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.runs import chat_lines, hpckv, texts, write_run
from tests.cluster.slurm import Slurm
from tests.cluster.test_batch_scripts import logs, sbatch, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slurm, pytest.mark.mpi]


@contextlib.contextmanager
def disk_of(cluster: Slurm, node: str, point: Path, limit: str) -> Iterator[list[str]]:
    """A filesystem that only this node has; how to run a command beside it."""
    point.mkdir()
    there = cluster.in_mounts_of(node)
    subprocess.run([*there, "mount", "-t", "tmpfs", "-o", limit, "small", str(point)], check=True)
    try:
        yield there
    finally:
        subprocess.run([*there, "umount", "-l", str(point)], check=True)


def test_a_node_whose_disk_is_full_and_stores_that_are_cost_no_answer(cluster: Slurm, tmp_path, checkpoint):
    model, lines = checkpoint("llama", tokenizer=True), chat_lines(24)
    runs = {
        "disk": ("a100-0", {"shared": str(tmp_path / "disk" / "kv"), "write": "all", "host_size": "0"}),
        "store": ("a100-1", {"shared": str(tmp_path / "store" / "full" / "kv"), "write": "all", "segment_size": 1}),
        "quota": ("v100-0", {"shared": str(tmp_path / "quota" / "kv"), "write": "all", "segment_size": 1}),
    }
    files = {}
    for name, (_, store) in runs.items():
        (tmp_path / name).mkdir()
        sections = {"store": store, "sampling": {"max_tokens": 8, "ignore_eos": True}}
        files[name] = write_run(tmp_path / name, model, lines, **sections)
    staged = json.loads(files["disk"].read_text())
    staged["model"]["stage"] = True
    files["disk"].write_text(json.dumps(staged))
    assert hpckv("store", "init", runs["quota"][1]["shared"], "--quota", "200KiB").returncode == 0
    wanted_of = hpckv(
        "run", files["disk"], "--output", tmp_path / "alone"
    )  # and there is something to copy to the node
    assert wanted_of.returncode == 0, wanted_of.stderr
    scratch, temporary, full = tmp_path / "scratch", tmp_path / "temporary", tmp_path / "store" / "full"
    with contextlib.ExitStack() as disks:
        there = disks.enter_context(disk_of(cluster, "a100-0", scratch, "size=16k"))
        disks.enter_context(disk_of(cluster, "a100-0", temporary, "nr_inodes=1"))
        disks.enter_context(disk_of(cluster, "a100-1", full, "size=256k"))
        subprocess.run([*there, "sh", "-c", f"cat /dev/zero >{scratch}/filler"], stderr=subprocess.DEVNULL, check=False)
        jobs = {}
        for name, (node, _) in runs.items():
            on_it = {"HPCKV_LOCAL": str(scratch), "TMPDIR": str(temporary), "SLURM_TMPDIR": str(temporary)}
            flags = ("--partition=all", "--constraint=", f"--nodelist={node}", "--gpus-per-node=0")
            jobs[name] = sbatch(
                cluster,
                tmp_path / name,
                "single_a100.sh",
                files[name],
                flags=flags,
                HPCKV_RUN_DIR=str(tmp_path / name / "out"),
                **(on_it if name == "disk" else {}),
            )
        said = {}
        for name, job in jobs.items():
            assert wait_for(cluster, job, 240.0) == ("COMPLETED", "0:0"), logs(tmp_path / name)
            said[name] = logs(tmp_path / name)
    wanted = texts(tmp_path, "alone")
    for name in runs:
        assert texts(tmp_path / name) == wanted, name

    assert f"no caches in {temporary}; the next place is tried" in said["disk"]
    assert "0B free, the model has " in said["disk"]
    assert f"{scratch}/hpckv-0/" in said["disk"]
    assert said["disk"].count("no room for more copies; blocks are read from where they lie") == 1
    assert "tokens loaded" in said["disk"]
    assert "No space left on device" in said["store"]
    assert "nothing more is written to it in this run" in said["store"]
    assert "could not be kept" in said["quota"]
    store = json.loads(hpckv("store", "info", runs["quota"][1]["shared"], "--json").stdout)
    assert store["used"]["bytes"] <= 200 * 1024
