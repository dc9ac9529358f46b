"""What the tests of accounting on a cluster have in common: runs of ordinary users, and what interrupts them."""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

from tests.cli.runs import write_run
from tests.cluster.site import Site


def can_be_read_by_others(path: Path) -> bool:
    return all(part.stat().st_mode & 0o001 for part in (path, *path.parents))


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another filesystem
        shutil.copy2(source, target)


def run_hpckv(site: Site, home: Path, who: str, *arguments: object, **options):
    return site.run(who, home / ".venv" / "bin" / "hpckv", *arguments, **options)


def make_store(site: Site, home: Path, who: str) -> Path:
    member = site.people[who]
    folder = site.shared / f"accounting-{member.project}"
    folder.mkdir()
    shutil.chown(folder, member.name, member.group)
    folder.chmod(0o2750)
    done = run_hpckv(site, home, who, "store", "init", folder / "kv", "--group", member.group)
    assert done.returncode == 0, done.stderr
    return folder / "kv"


def a_run(
    site: Site, who: str, name: str, model: Path, lines: list[dict], store: Path, tokens: int = 4, **more
) -> Path:
    """A run file, owned by that user."""
    member = site.people[who]
    folder = member.home / f"books-{name}"
    folder.mkdir()
    sampling = {"max_tokens": tokens, "ignore_eos": True}
    shares = {"shared": str(store), "local": "none", "write": "all"}
    run_file = write_run(folder, model, lines, sampling=sampling, store=shares, **more)
    for path in (folder, run_file, folder / "in.jsonl"):
        shutil.chown(path, member.name, member.group)
    return run_file


def submit(site: Site, who: str, script: str, run_file: Path, *flags: str, **environ: str) -> str:
    """One rank with a GPU, and no MPI: that is in the image."""
    options = ("--partition=all", "--gpus-per-node=1", *flags)
    own = {"HPCKV_HOME": str(site.shared / "hpckv-accounting"), "HPCKV_MPI": "none"}
    return site.sbatch(who, script, run_file, flags=options, **own, **environ)


def until(happened, site: Site, patience_s: float = 90.0) -> None:
    end = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < end, site.logs()
        time.sleep(0.05)


def count_lines(*paths: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())


def tell_that_time_is_up(site: Site, who: str, job: str) -> None:
    done = site.run(who, "scancel", "--batch", "--signal=USR1", job)
    assert done.returncode == 0, done.stderr


def kill_run(job: str) -> None:
    """As the kernel does when memory is short: the Python of that job, without a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"hpckv.cli.main" in words and f"SLURM_JOB_ID={job}".encode() in (path / "environ").read_bytes().split(
                b"\0"
            ):
                found.append(int(path.name))
    assert found
    for pid in found:
        os.kill(pid, signal.SIGKILL)


class Books:
    """What was done on the cluster: runs by user, with the jobs that worked on each."""

    def __init__(self) -> None:
        self.runs: dict[str, list[Path]] = {}
        self.jobs: dict[Path, list[str]] = {}
        self.stores: dict[str, Path] = {}
        self.before = time.time()

    def add(self, who: str, run_file: Path, *jobs: str) -> None:
        self.runs.setdefault(who, []).append(run_file.parent)
        self.jobs[run_file.parent] = list(jobs)
