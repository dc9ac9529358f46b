"""submitit's executors as a run needs them. Imported when something is submitted: submitit imports numpy.

Its own way with a step is left out (`use_srun=False`): it runs srun in the foreground, where bash cannot hand on signals, and
requeues from inside a task, where a container has no scontrol. The command it renders is `hpckv_worker PYTHON -m submitit...`,
a function of `slurm/lib/common.sh`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import submitit

from hpckv.errors import HpckvError
from hpckv.launch.environment import environment, scrubbed
from hpckv.launch.folder import CONFIG
from hpckv.launch.script import BatchScript
from hpckv.launch.worker import work, work_here

_ON_COMMAND_LINE = "on-command-line"
_NO_LIMIT_MIN = 60 * 24 * 366


class SlurmError(HpckvError):
    """Slurm did not take the job."""

    exit_code = 69


class BatchExecutor(submitit.SlurmExecutor):
    """Renders where there is no Slurm, and gives sbatch what a script's header cannot hold."""

    def __init__(self, script: BatchScript) -> None:
        super().__init__(script.folder, python=f"hpckv_worker {shlex.quote(script.worker_python)}")
        self._script = script
        options, logs = script.options, script.logs
        # submitit always names a log, its own unless told.
        asked = {**options, **{name: _ON_COMMAND_LINE if "\n" in value else value for name, value in logs.items()}}
        self.update_parameters(
            setup=script.setup,
            use_srun=False,
            stderr_to_stdout=True,  # standard error goes to the log unless `slurm.error` says otherwise
            nodes=asked.pop("nodes"),
            job_name=asked.pop("job-name"),
            time=None,  # submitit's default would be five minutes
            wckey=None,  # and its own, which sites that know wckeys refuse
            additional_parameters={name: value for name, value in asked.items() if value is not None},
        )

    @classmethod
    def affinity(cls) -> int:
        """Whether there is a Slurm is not asked here."""
        return 1

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        text: str = super()._make_submission_file_text(command, uid)
        text = re.sub(rf"#SBATCH --(output|error)={_ON_COMMAND_LINE}\n", "", text)
        # submitit writes some whether asked or not.
        omitted = "|".join(map(re.escape, self._script.slurm.omit))
        return re.sub(rf"#SBATCH --({omitted})(=.*)?\n", "", text) if omitted else text

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", *self._script.arguments, str(submission_file_path)]


def render(script: BatchScript) -> str:
    """The batch script as it would be submitted; writes nothing."""
    executor = BatchExecutor(script)
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit_to_slurm(script: BatchScript, environ: Mapping[str, str]) -> str:
    """Raises `SlurmError` with sbatch's words; the job's number."""
    executor = BatchExecutor(script)
    options = [name for name, value in {**script.options, **script.logs}.items() if value is not None]
    with environment(scrubbed(environ, options)), _quiet():
        try:
            job = executor.submit(work, str(script.folder / CONFIG))
        except (RuntimeError, OSError) as error:  # submitit's errors are RuntimeErrors
            said = [line for line in str(error).splitlines() if line.strip()]
            raise SlurmError(said[-1] if said else "sbatch failed without a word") from None
    return str(job.job_id)


def submit_here(script: BatchScript, environ: Mapping[str, str]) -> Any:
    """A submitit job of this machine: its ranks are processes that outlive this one."""
    slurm = script.slurm
    limit, ranks = slurm.limit_s, script.num_tasks
    command = shlex.join(["bash", str(script.folder / "here.sh"), script.worker_python])
    executor = submitit.LocalExecutor(script.folder, python=command)
    gpus = str(slurm.gpus_per_node or 0).rpartition(":")[2]
    executor.update_parameters(
        tasks_per_node=ranks,
        gpus_per_node=int(gpus),
        timeout_min=_NO_LIMIT_MIN if limit is None else min(limit / 60, _NO_LIMIT_MIN),
        signal_delay_s=script.signal_s,
    )
    with environment({**scrubbed(environ), "HPCKV_PORT": str(_free_port())}), _quiet():
        return executor.submit(work, str(script.folder / CONFIG))


def run_here(script: BatchScript) -> None:
    """This process becomes the run (debug executor); does not return."""
    executor = submitit.DebugExecutor(script.folder)
    executor.submit(work_here, str(script.folder / CONFIG)).result()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """submitit and what it starts get no terminal: a local job would keep `$(hpckv submit --parsable)` waiting for its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for fd in (*kept, nowhere):
            os.close(fd)
