"""Batch scripts as `hpckv submit --dry-run` prints them, with placeholders for what differs between machines. For tests.

python -m tests.launch.scripts     # writes golden/ anew; look at the difference before you commit it
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cli.runs import write_run

TOP = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
HOSTILE = 'it\'s "odd", 100%\n$HOME `x` '
LINE = [{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a"}}]

CASES: dict[str, tuple[str, dict, list[str]]] = {
    "plain": ("folder", {}, ["-A", "proj", "-p", "gpu", "-t", "02:00:00", "--gpus-per-node", "1"]),
    "any_name": (HOSTILE, {"store": {"shared": "kv"}, "container": {"image": "image.sif"}}, ["--mem", "64G"]),
    "all_flags": (
        "a b",
        {
            "parallel": {"tp": 4, "pp": 2},
            "container": {"image": "image.sif", "runtime": "singularity", "bind": ["/data:/data:ro", "/opt"]},
            "slurm": {
                "setup": ["module load apptainer"],
                "srun": ["--label"],
                "mpi": "pmix",
                "sbatch": ["--mail-type=END"],
                "max_elapsed": "2-00:00:00",
                "max_points": 100,
                "points_per_node_hour": 2.2934,
                "attempts": 7,
            },
        },
        [
            *("-A", "proj", "-p", "gpu", "-q", "high", "-t", "1-12", "-N", "2", "-n", "8", "-c", "8"),
            *(
                "-C",
                "[v100|a100]",
                "--gres",
                "gpu:a100:4",
                "--gpus-per-node",
                "a100:4",
                "--mem",
                "0",
                "-J",
                "it's mine",
            ),
            *("-o", "logs/%x %j.log", "-e", "logs/%j.err", "-d", "afterok:7", "--reservation", "res", "-a", "0-3%2"),
            *("--tmp", "200G", "--continue", "chain", "--", "--exclusive", "--comment", 'it\'s a "test"'),
        ],
    ),
}


def render(folder: Path, case: str) -> str:
    """A case's script, run in a new folder in `folder`."""
    name, sections, flags = CASES[case]
    start = folder / name
    (start / "model").mkdir(parents=True)
    (start / "model" / "config.json").write_bytes((TOP / "examples" / "recall-1m" / "config.json").read_bytes())
    (start / "image.sif").touch()
    write_run(start, Path("model"), LINE, **sections, output="run %x")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HPCKV_", "SLURM_"))}
    command = [sys.executable, "-m", "hpckv.cli.main", "submit", "run.yaml", "--dry-run", *flags]
    done = subprocess.run(command, cwd=start, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return re.sub(r"\d{8}T\d{6}-[0-9a-f]{6}", "TIME-RANDOM", done.stdout.replace(str(folder), "/FOLDER")).replace(
        sys.executable, "/PYTHON"
    )


if __name__ == "__main__":
    for case in CASES:
        with tempfile.TemporaryDirectory() as made:
            (GOLDEN / f"{case}.sh").write_text(render(Path(made), case))
