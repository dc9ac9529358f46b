"""A batch script without Slurm, for tests: programs called srun, sbatch and scontrol that say what they were asked."""

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

TOP = Path(__file__).parents[2]
LIB = TOP / "slurm" / "lib"

_SRUN = """#!/bin/bash
[ "$1" = --mpi=list ] && { echo pmi2; exit; }
printf '%s\\n' "$@" >>"$CALLS/srun"
exec bash "$CALLS/step"
"""
_OTHER = """#!/bin/bash
printf '%s\\n' "$@" >>"$CALLS/{name}"
env | sort >"$CALLS/{name}.env"
{does}
"""


@dataclass
class Batch:
    """One script in one folder, started as often as wanted."""

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    """HPCKV_... of the script."""
    is_submitted: bool = True
    """As `hpckv submit` renders it; otherwise one of slurm/."""

    def __post_init__(self) -> None:
        for name in ("calls", "bin", "run/logs"):
            (self.folder / name).mkdir(parents=True)
        self.program("srun", _SRUN)
        self.program("sbatch", _OTHER.format(name="sbatch", does='echo "${NEXT_JOB:-77}"'))
        self.program("scontrol", _OTHER.format(name="scontrol", does='kill "$(cat "$CALLS/script")"'))

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, step: str, *, job: int = 1, **environ: str) -> subprocess.CompletedProcess:
        """Run the script to its end; `step` is what bash does in place of the run: `answer` adds an answer to its output."""
        (self.folder / "calls" / "step").write_text(f"answer() {{ echo '{{}}' >>\"$RUN/output.jsonl\"; }}\n{step}\n")
        lines = [f"export -n {name}='{value}'" for name, value in self.settings.items()]
        if self.is_submitted:
            (self.folder / "submit").mkdir(exist_ok=True)
            lines += [f"hpckv_folder='{self.folder}/submit'", f"export -n HPCKV_RUN_DIR='{self.folder}/run'"]
        command = "hpckv_worker python3 -m submitit" if self.is_submitted else 'hpckv_main run "$@"'
        script = self.folder / "script.sh"
        script.write_text(
            "\n".join(['echo $$ >"$CALLS/script"', *lines, f". '{LIB}/common.sh' || exit 66", command, ""])
        )
        arguments = [] if self.is_submitted else ["run.yaml"]
        return subprocess.run(
            ["bash", str(script), *arguments],
            env=self.environ(job) | environ,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
            check=False,
        )

    def environ(self, job: int) -> dict[str, str]:
        return {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "TMPDIR": str(self.folder),
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_CONF": "/etc/slurm.conf",
            "HPCKV_HOME": str(TOP),
            "CALLS": str(self.folder / "calls"),
            "RUN": str(self.folder / "run"),
        }

    def called(self, name: str) -> list[str]:
        """Every argument of every call."""
        path = self.folder / "calls" / name
        return path.read_text().splitlines() if path.exists() else []


def batch(folder: Path, *, is_submitted: bool = True, **settings: str) -> Batch:
    """One with these settings, HPCKV_ left out and in small letters."""
    return Batch(folder, {f"HPCKV_{name.upper()}": value for name, value in settings.items()}, is_submitted)
