"""Which folder of the node's own disk copies go to: the order of the places, and who is asked before whom."""

from pathlib import Path

import pytest

from hpckv.errors import AccessError
from hpckv.store import local_disk
from hpckv.store.local_disk import Mount, find_local_folder

STORE = Path("/lustre/kv")
NAMES = ("HPCKV_LOCAL", "SLURM_TMPDIR", "site", "TMPDIR")


@pytest.fixture
def places(tmp_path, monkeypatch) -> dict[str, Path]:
    """A folder for each name; what lies in one called `memory` or `network` is such a filesystem."""
    kinds = {"memory": "tmpfs", "network": "lustre", "lustre": "lustre"}

    def mount_of(path: Path) -> Mount:
        return Mount(kind=next((kinds[part] for part in path.parts if part in kinds), "ext4"))

    monkeypatch.setattr(local_disk, "mount_of", mount_of)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    found = {}
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        found[name] = tmp_path / name
        found[name].mkdir()
    return found


def test_the_order_is_variable_job_site_temporary(places, monkeypatch):
    def found() -> Path | None:
        return find_local_folder("auto", STORE, str(places["site"]))

    for name in ("HPCKV_LOCAL", "SLURM_TMPDIR", "TMPDIR"):
        monkeypatch.setenv(name, str(places[name]))
    assert found() == places["HPCKV_LOCAL"]
    monkeypatch.delenv("HPCKV_LOCAL")
    assert found() == places["SLURM_TMPDIR"]
    monkeypatch.delenv("SLURM_TMPDIR")
    assert found() == places["site"]
    assert find_local_folder("auto", STORE) == places["TMPDIR"]


def test_a_folder_that_the_run_file_names_is_before_all(places, monkeypatch, tmp_path):
    for name in ("HPCKV_LOCAL", "SLURM_TMPDIR", "TMPDIR"):
        monkeypatch.setenv(name, str(places[name]))
    assert find_local_folder(str(tmp_path), STORE, str(places["site"])) == tmp_path
    assert find_local_folder("none", STORE, str(places["site"])) is None


def test_memory_and_the_network_are_passed_over_unless_somebody_named_them(places, monkeypatch, tmp_path):
    for name in ("memory", "network"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "memory"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "network"))
    assert find_local_folder("auto", STORE, str(places["site"])) == places["site"]
    assert find_local_folder("auto", STORE) == Path("/tmp")
    assert find_local_folder("auto", STORE, str(tmp_path / "memory")) == tmp_path / "memory"
    monkeypatch.setenv("HPCKV_LOCAL", str(tmp_path / "memory"))
    assert find_local_folder("auto", STORE) == tmp_path / "memory"


def test_a_store_on_a_disk_of_the_node_has_no_copies_for_a_site_files_sake(places):
    assert find_local_folder("auto", Path("/data/kv"), str(places["site"])) is None


def test_a_site_files_folder_that_this_node_does_not_have_is_said_and_the_next_is_taken(places, monkeypatch, caplog):
    monkeypatch.setenv("TMPDIR", str(places["TMPDIR"]))
    places["site"].rmdir()
    assert find_local_folder("auto", STORE, str(places["site"])) == places["TMPDIR"]
    assert f"{places['site']}: the site file's local disk is no folder that can be written to" in caplog.text
    with pytest.raises(AccessError):
        find_local_folder(str(places["site"]), STORE)
