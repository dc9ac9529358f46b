"""A real Slurm for tests: a controller with accounting, and nodes that are hosts of their own as far as the kernel lets them.

Each node has its own network, host name, processes' shared memory and /dev/shm; they meet on a bridge that nothing else is on.
Daemons run in the foreground and die with the process that started them; nothing listens outside these networks.
GPUs are devices of which Slurm only counts the names.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PATIENCE_S = 60.0
_FOLDERS, _PREFIX = Path("/var/tmp"), "hpckv-slurm-"
"""Sockets' paths may be 107 bytes long, and every node has a /dev/shm of its own."""
_CONTROLLER = "ctl"
_SLURMDBD_PORT, _MARIADB_PORT = 16819, 13306


@dataclass(frozen=True)
class Node:
    """What Slurm is told of a node."""

    gpu: str
    num_gpus: int = 4
    features: Sequence[str] = ()
    cpus: int = 8
    memory_mb: int = 4000


NODES: Mapping[str, Node] = {
    "v100-0": Node("v100", features=("v100", "gpu16g", "nvlink")),
    "a100-0": Node("a100", features=("a100", "gpu40g", "nvlink", "ib")),
    "a100-1": Node("a100", features=("a100", "gpu40g", "nvlink", "ib")),
    "h100-0": Node("h100", features=("h100", "gpu80g", "nvswitch", "ib")),
}

_SLURM_CONF = """
ClusterName=hpckv
SlurmctldHost={controller}({address})
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldParameters=preempt_send_user_signal
SlurmUser=slurm
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/spool/ctld
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurm/slurmctld.pid
SlurmdPidFile={folder}/slurm/slurmd-%n.pid
SlurmctldLogFile={folder}/slurm/slurmctld.log
SlurmdLogFile={folder}/slurm/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0,max_rpc_cnt=0,salloc_wait_nodes
PriorityType=priority/multifactor
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={address}
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge/socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,limits,qos
AccountingStoreFlags=job_comment,job_script,job_env
KillWait=5
MinJobAge=300
OverTimeLimit=0
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=60
MessageTimeout=20
TCPTimeout=5
TmpFS={folder}/tmp/%n
"""
_SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost={controller}
DbdAddr={address}
DbdPort={dbd_port}
SlurmUser=slurm
DebugLevel=info
LogFile={folder}/slurm/slurmdbd.log
PidFile={folder}/slurm/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mariadb_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CommitDelay=1
"""


class Slurm:
    """The cluster, while it is up."""

    def __init__(self, folder: Path, nodes: Mapping[str, Node]) -> None:
        self.folder, self.nodes = folder, nodes
        # A host's namespace is named after this process, so that two test runs on one machine have two clusters.
        self._spaces = {name: f"hk{os.getpid()}-{name}" for name in (_CONTROLLER, *nodes)}
        self._addresses = {name: f"10.77.0.{10 + n}" for n, name in enumerate(self._spaces)}
        self._daemons: dict[str, subprocess.Popen] = {}

    @property
    def environ(self) -> dict[str, str]:
        """What clients need to find the controller."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        for part in ("", "munge", "slurm", "spool", "spool/ctld", "tmp", "db"):
            (self.folder / part).mkdir(exist_ok=True)
            (self.folder / part).chmod(0o755)
        for part, user in (("munge", "munge"), ("slurm", "slurm"), ("spool/ctld", "slurm"), ("db", "mysql")):
            shutil.chown(self.folder / part, user, user)
        self._make_hosts()
        self._write_configuration()
        self._start_munge()
        self._start_database()
        self._start_controller()
        self._start_nodes()

    def run(self, *command: str, timeout: float = 120.0, **options) -> subprocess.CompletedProcess:
        """A command on the login node, which is the controller's."""
        options = {"env": self.environ, "text": True, "capture_output": True, "check": False, **options}
        return subprocess.run(self.on_host(_CONTROLLER, *command), timeout=timeout, **options)

    def start_command(self, *command: str, **options) -> subprocess.Popen:
        """The same, not waited for."""
        return subprocess.Popen(self.on_host(_CONTROLLER, *command), env=self.environ, text=True, **options)

    def on_login_node(self, *command: str) -> list[str]:
        """A command line that runs on the login node."""
        return self.on_host(_CONTROLLER, *command)

    def in_mounts_of(self, node: str) -> list[str]:
        """In front of a command that is to mount something on a node only."""
        return ["nsenter", f"--target={self._daemons[f'slurmd {node}'].pid}", "--mount"]

    def on_host(self, name: str, *command: str) -> list[str]:
        """A command line that runs on a node's network."""
        return ["ip", "netns", "exec", self._spaces[name], *command]

    def set_link(self, node: str, *, up: bool) -> None:
        """Plug a node's network cable in, or out."""
        _run("ip", "-n", self._spaces[node], "link", "set", "eth0", "up" if up else "down")

    def wait_until_idle(self, patience_s: float = _PATIENCE_S) -> None:
        """Every node is there and has nothing to do."""

        def are_idle() -> bool:
            states = self.run("sinfo", "-h", "-N", "-o", "%T").stdout.split()
            return len(states) >= len(self.nodes) and set(states) == {"idle"}

        _wait("idle nodes", are_idle, patience_s)

    def restart_controller(self) -> None:
        """As for maintenance: it writes down what it knows and comes back."""
        process = self._daemons.pop("slurmctld")
        process.terminate()
        process.wait()
        self._start_slurmctld()

    def end_all_jobs(self) -> None:
        """Everybody's."""
        for state in ("RUNNING", "PENDING", "SUSPENDED"):
            self.run("scancel", f"--state={state}")
        with contextlib.suppress(RuntimeError):
            _wait("end of all jobs", lambda: not self.run("squeue", "-h").stdout.strip(), 20.0)

    def stop(self) -> None:
        """Jobs first, then nodes, then what they report to."""
        if "slurmctld" in self._daemons:
            self.end_all_jobs()
        for names in ([f"slurmd {node}" for node in self.nodes], ["slurmctld"], ["slurmdbd"], ["mariadbd"], ["munged"]):
            processes = [self._daemons.pop(name) for name in names if name in self._daemons]
            for process in processes:
                process.terminate()
            for process in processes:
                try:
                    process.wait(10.0)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        for space in self._spaces.values():
            _remove_host(space)

    def _make_hosts(self) -> None:
        hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in self._addresses.items())
        for space in self._spaces.values():
            _run("ip", "netns", "add", space)
            _run("ip", "-n", space, "link", "set", "lo", "up")
            (Path("/etc/netns") / space).mkdir(parents=True)
            (Path("/etc/netns") / space / "hosts").write_text(hosts)
        controller = self._spaces[_CONTROLLER]
        _run("ip", "-n", controller, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", controller, "link", "set", "br0", "up")
        _run("ip", "-n", controller, "addr", "add", f"{self._addresses[_CONTROLLER]}/24", "dev", "br0")
        for n, node in enumerate(self.nodes):
            space, port = self._spaces[node], f"p{n}"
            _run("ip", "link", "add", port, "netns", controller, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "-n", controller, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", space, "addr", "add", f"{self._addresses[node]}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")

    def _write_configuration(self) -> None:
        names = {
            "folder": self.folder,
            "controller": _CONTROLLER,
            "address": self._addresses[_CONTROLLER],
            "dbd_port": _SLURMDBD_PORT,
            "mariadb_port": _MARIADB_PORT,
        }
        lines, gres = [_SLURM_CONF.format(**names)], ["AutoDetect=off"]
        for name, node in self.nodes.items():
            lines.append(
                f"NodeName={name} NodeAddr={self._addresses[name]} CPUs={node.cpus} Sockets=1 CoresPerSocket={node.cpus} "
                f"ThreadsPerCore=1 RealMemory={node.memory_mb} Feature={','.join(node.features)} "
                f"Gres=gpu:{node.gpu}:{node.num_gpus}"
            )
            devices = f"{self.folder}/gpu/nvidia[0-{node.num_gpus - 1}]"
            gres.append(f"NodeName={name} Name=gpu Type={node.gpu} File={devices}")
        for kind in dict.fromkeys(node.gpu for node in self.nodes.values()):
            members = ",".join(name for name, node in self.nodes.items() if node.gpu == kind)
            lines.append(f"PartitionName={kind} Nodes={members} MaxTime=1:00:00 DefaultTime=5 State=UP PriorityTier=10")
        everything = f"Nodes={','.join(self.nodes)} MaxTime=1:00:00 DefaultTime=5 State=UP"
        lines.append(f"PartitionName=all {everything} Default=YES PriorityTier=10")
        lines.append(f"PartitionName=low {everything} PriorityTier=1 PreemptMode=REQUEUE")
        (self.folder / "gpu").mkdir()
        for n in range(max(node.num_gpus for node in self.nodes.values())):
            os.mknod(self.folder / "gpu" / f"nvidia{n}", 0o20666, os.makedev(1, 3))
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (self.folder / "gres.conf").write_text("\n".join(gres) + "\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        secret = self.folder / "slurmdbd.conf"
        secret.write_text(_SLURMDBD_CONF.format(**names))
        secret.chmod(0o600)
        shutil.chown(secret, "slurm", "slurm")

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        shutil.chown(munge / "key", "munge", "munge")
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        arguments = [f"--{option}={munge / name}" for option, name in files.items()]
        as_munge = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
        self._daemon("munged", _CONTROLLER, *as_munge, "/usr/sbin/munged", "--foreground", *arguments)
        self._wait_for("munged", (munge / "socket").exists)

    def _start_database(self) -> None:
        db = self.folder / "db"
        options = ["--no-defaults", "--user=mysql", f"--datadir={db}", "--skip-test-db"]
        _run("mariadb-install-db", *options, "--auth-root-authentication-method=socket")
        small = [
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
            "--innodb-flush-log-at-trx-commit=2",
            "--innodb-log-file-size=64M",
            "--performance-schema=off",
        ]
        where = [f"--socket={db}/socket", f"--pid-file={db}/pid", f"--port={_MARIADB_PORT}", "--bind-address=127.0.0.1"]
        server = ["mariadbd", "--no-defaults", "--user=mysql", f"--datadir={db}", "--skip-name-resolve", *where, *small]
        self._daemon("mariadbd", _CONTROLLER, *server)
        client = ["mariadb", "--no-defaults", f"--socket={db}/socket"]
        self._wait_for("mariadbd", lambda: self.run(*client, "-e", "select 1").returncode == 0)
        statements = (
            "create database slurm_acct_db; create user 'slurm'@'127.0.0.1' identified by 'slurm'; "
            "grant all on slurm_acct_db.* to 'slurm'@'127.0.0.1';"
        )
        self.run(*client, "-e", statements, check=True)

    def _start_controller(self) -> None:
        self._daemon("slurmdbd", _CONTROLLER, "slurmdbd", "-D")
        # Before the controller, which does not start without its cluster.
        add = ["sacctmgr", "-i", "add", "cluster", "hpckv"]
        self._wait_for("slurmdbd", lambda: self.run(*add).returncode == 0)
        self._start_slurmctld()

    def _start_slurmctld(self) -> None:
        self._daemon("slurmctld", _CONTROLLER, "slurmctld", "-D")
        self._wait_for("slurmctld", lambda: " UP" in self.run("scontrol", "ping").stdout)

    def _start_nodes(self) -> None:
        for node in self.nodes:
            for part in ("spool", "tmp"):
                (self.folder / part / node).mkdir()
            (self.folder / "tmp" / node).chmod(0o1777)
            own = f"hostname {node}; mount -t tmpfs -o mode=1777,size=2g shm /dev/shm; exec slurmd -D -N {node}"
            self._daemon(f"slurmd {node}", node, "unshare", "--uts", "--ipc", "--mount", "sh", "-c", own)
        self.wait_until_idle()

    def _daemon(self, name: str, host: str, *command: str) -> None:
        if host == _CONTROLLER and name != "munged":
            command = ("unshare", "--uts", "sh", "-c", f'hostname {_CONTROLLER}; exec "$@"', "sh", *command)
        line = ["setpriv", "--pdeathsig", "TERM", *self.on_host(host, *command)]
        with (self.folder / f"{name.replace(' ', '-')}.out").open("w") as out:
            self._daemons[name] = subprocess.Popen(
                line, env=self.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def _wait_for(self, name: str, is_there: Callable[[], bool]) -> None:
        def look() -> bool:
            if self._daemons[name].poll() is not None:
                raise RuntimeError(f"{name} does not come up: {(self.folder / f'{name}.out').read_text()[-2000:]}")
            return is_there()

        _wait(name, look, _PATIENCE_S)


def _remove_host(space: str) -> None:
    """Whatever still runs on its network ends."""
    listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
    for pid in listed.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
    shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)


def _sweep() -> None:
    """What clusters have left behind whose test run was killed."""
    for path in Path("/run/netns").glob("hk*-*"):
        if not Path(f"/proc/{path.name[2:].partition('-')[0]}").exists():
            _remove_host(path.name)
    for folder in _FOLDERS.glob(f"{_PREFIX}*"):
        if not Path(f"/proc/{folder.name.removeprefix(_PREFIX).partition('-')[0]}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")


def _wait(what: str, is_there: Callable[[], bool], patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while not is_there():
        if time.monotonic() > end:
            raise RuntimeError(f"no {what} in {patience_s:g} s")
        time.sleep(0.05)


@contextlib.contextmanager
def slurm(nodes: Mapping[str, Node] = NODES) -> Iterator[Slurm]:
    """Up, and down again whatever happens. Needs root."""
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_FOLDERS))
    cluster = Slurm(folder, nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)
