"""A computing centre for tests: the Slurm of `slurm.py`, a filesystem that all its hosts mount, and people in two projects.

Every host has a GlusterFS client of its own, mounted where the others have theirs. Accounts and Unix groups are named after
the projects. Nothing of a user's environment is ours, nor can users read our files.
"""

import contextlib
import grp
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.glusterfs import STALE, GlusterFS
from tests.cluster.slurm import Slurm

TOP = Path(__file__).parents[2]
PROJECTS = {"vision": ("alice", "bob"), "nlp": ("carol",)}
_LOGIN = "login"
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Member:
    """Somebody with an account."""

    name: str
    """Of the test run's own, so that two at once do not meet."""
    project: str
    group: str
    home: Path


class Site:
    """The centre, while it is up."""

    def __init__(self, cluster: Slurm) -> None:
        self.cluster = cluster
        self.shared = cluster.folder / "shared"
        self.people: dict[str, Member] = {}
        self._gluster = GlusterFS(cluster.folder / "gluster", dict.fromkeys((_LOGIN, *cluster.nodes), STALE))

    def start(self) -> None:
        self.shared.mkdir()
        inside = {node: self.cluster.in_mounts_of(node) for node in self.cluster.nodes}
        self._gluster.start(at=self.shared, inside=inside)
        (self.shared / "home").mkdir()
        for path in (self.cluster.folder, self.shared, self.shared / "home"):
            path.chmod(0o755)
        for project, names in PROJECTS.items():
            self._add_project(project, names)
        # What a user has cloned, and may not write to.
        shutil.copytree(TOP / "slurm", self.shared / "hpckv" / "slurm")
        _run("chmod", "-R", "a+rX", self.shared / "hpckv")

    def stop(self) -> None:
        self.cluster.end_all_jobs()
        self._gluster.stop()
        for member in self.people.values():
            subprocess.run(["userdel", member.name], capture_output=True, check=False)
        for group in {member.group for member in self.people.values()}:
            subprocess.run(["groupdel", group], capture_output=True, check=False)

    @property
    def home(self) -> Path:
        """The checkout that every user can read."""
        return self.shared / "hpckv"

    def run(
        self, who: str, *command: object, env: Mapping[str, str] | None = None, **options
    ) -> subprocess.CompletedProcess:
        """A command on the login node, as a user, in their home unless `cwd` says otherwise."""
        options = {"timeout": 300, "text": True, "capture_output": True, "check": False, **options}
        return subprocess.run(self._line(who, command), **self._as(who, env), **options)

    def sbatch(self, who: str, script: str, *arguments: object, flags: tuple = (), **env: str) -> str:
        """Submit a script of `slurm/`; the job's number. Logs go to `log-JOB` in that user's home."""
        member = self.people[who]
        own = [f"--account={member.project}", "--cpus-per-task=1", "--mem=1000M", "--time=20", "--gpus-per-node=0"]
        command = ["sbatch", "--parsable", *own, f"--output={member.home}/log-%A-%a-%j", *flags]
        done = self.run(
            who, *command, self.home / "slurm" / script, *arguments, env={"HPCKV_HOME": str(self.home), **env}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def wait(self, job: str, patience_s: float = 300.0) -> set[tuple[str, str]]:
        """States and exit codes of a job, or of all tasks of an array, once they are over."""
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            shown = self.cluster.run("scontrol", "--oneliner", "show", "job", job).stdout.strip()
            tasks = [dict(part.partition("=")[::2] for part in line.split()) for line in shown.splitlines()]
            if tasks and all(task.get("JobState") in _OVER for task in tasks):
                return {(task["JobState"], task["ExitCode"]) for task in tasks}
            time.sleep(0.3)
        raise AssertionError(f"job {job} is not over: {shown}\n{self.logs()}")

    def accounted(self, job: str) -> list[str]:
        """What `sacct` has of a job and its tasks, once it knows that they are over: user, account, state, exit code, nodes."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            fields = "User,Account,State,ExitCode,NNodes"
            rows = self.cluster.run("sacct", "-n", "-X", "-P", "-j", job, "-o", fields).stdout.splitlines()
            if rows and all(any(state in row for state in _OVER) for row in rows):
                break
            time.sleep(0.3)
        return rows

    def logs(self) -> str:
        """What all jobs have said."""
        return "".join(path.read_text() for path in sorted(self.shared.glob("home/*/log-*")))

    def _add_project(self, project: str, names: tuple[str, ...]) -> None:
        group = f"hk{os.getpid()}{project}"
        _run("groupadd", group)
        self._sacctmgr("account", project)
        for short in names:
            name, home = f"hk{os.getpid()}{short}", self.shared / "home" / short
            # As at most centres, the project's group is not their first.
            options = [
                "--user-group",
                "--groups",
                group,
                "--no-create-home",
                "--home-dir",
                home,
                "--shell",
                "/bin/bash",
            ]
            _run("useradd", *options, name)
            home.mkdir(mode=0o750)
            shutil.chown(home, name, group)
            self.people[short] = Member(name, project, group, home)
            self._sacctmgr("user", name, f"account={project}")

    def _sacctmgr(self, *what: str) -> None:
        done = self.cluster.run("sacctmgr", "-i", "add", *what)
        assert done.returncode == 0, done.stderr + done.stdout

    def _line(self, who: str, command: tuple[object, ...]) -> list[str]:
        member = self.people[who]
        become = ["setpriv", f"--reuid={member.name}", f"--regid={member.name}", "--init-groups", "--"]
        return self.cluster.on_login_node(*become, *map(str, command))

    def _as(self, who: str, env: Mapping[str, str] | None) -> dict:
        member = self.people[who]
        own = {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(member.home),
            "USER": member.name,
            "LANG": "C.UTF-8",
            "SLURM_CONF": self.cluster.environ["SLURM_CONF"],
            "OMP_NUM_THREADS": "1",
        }
        return {"cwd": member.home, "env": {**own, **(env or {})}}


def _run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr or done.stdout}")


def _sweep() -> None:
    """Users of test runs that were killed."""
    for entry in [*pwd.getpwall(), *grp.getgrall()]:
        name = entry[0]
        digits = name[2:].rstrip("abcdefghijklmnopqrstuvwxyz")
        if name.startswith("hk") and digits.isdigit() and not Path(f"/proc/{digits}").exists():
            subprocess.run(["userdel" if len(entry) == 7 else "groupdel", name], capture_output=True, check=False)


@contextlib.contextmanager
def site(cluster: Slurm) -> Iterator[Site]:
    """Up, and down again whatever happens."""
    _sweep()
    centre = Site(cluster)
    try:
        centre.start()
        yield centre
    finally:
        centre.stop()
