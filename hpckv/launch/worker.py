"""What a job of `hpckv submit` does: become `hpckv run` with the configuration that was resolved when it was submitted.

submitit calls this with the one thing that is pickled, a path. The process is replaced, so nothing of submitit's handles
signals: it would call `scontrol`, which no container has; and numpy's threads would take a signal with its default effect.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from hpckv.launch.folder import FLAGS
from hpckv.schema import read_yaml
from hpckv.workload.drain import DRAIN_SIGNALS
from hpckv.workload.runfile import ENVIRONMENT


def work(config: str) -> NoReturn:
    """Become `hpckv run` of a resolved configuration, with the flags beside it."""
    command = [sys.executable, "-u", "-m", "hpckv.cli.main", "run", config, *read_flags(Path(config))]
    signal.pthread_sigmask(signal.SIG_BLOCK, DRAIN_SIGNALS)  # what comes from now on waits for the run
    os.execve(sys.executable, command, worker_environment(read_yaml(Path(config)), os.environ))


def work_here(config: str) -> NoReturn:
    """The same for the debug executor, in front of the user: this process becomes the run, in its container if there is one."""
    folder = Path(config).parent
    command = ["bash", str(folder / "here.sh"), *json.loads((folder / "python.json").read_text())]
    os.execvp("bash", [*command, "-u", "-m", "hpckv.cli.main", "run", config, *read_flags(Path(config))])


def read_flags(config: Path) -> list[str]:
    """Of `hpckv run`, beside its configuration."""
    flags: list[str] = json.loads((config.parent / FLAGS).read_text())
    return flags


def worker_environment(config: Mapping[str, object], environ: Mapping[str, str]) -> dict[str, str]:
    """For `hpckv run`: variables that the configuration has already heeded would have more weight than it."""
    kept = {name: value for name, value in environ.items() if name not in ENVIRONMENT}
    store = config.get("store")
    if isinstance(store, dict) and store.get("local") == "auto" and (local := environ.get("HPCKV_LOCAL")):
        kept["HPCKV_LOCAL"] = local  # the node's, known only there
    if int(environ.get("SUBMITIT_LOCAL_NTASKS", "1")) > 1:  # no launcher told these ranks who they are
        rank = environ["SUBMITIT_LOCAL_GLOBALID"]
        kept |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": environ["SUBMITIT_LOCAL_NTASKS"]}
        kept |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": environ["HPCKV_PORT"]}
    return kept
