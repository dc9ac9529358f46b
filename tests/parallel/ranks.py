"""Starting the test program on several ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

MPIEXEC = str(Path(sys.executable).parent / "mpiexec")
TOP = Path(__file__).parents[2]


def run_cases(folder: Path, cases: list[dict], *, size: int, timeout: float = 300) -> list[dict]:
    """All cases in one start of `size` ranks; their results."""
    (folder / "cases.json").write_text(json.dumps([{**case, "world": size} for case in cases]))
    results = folder / "results.json"
    results.unlink(missing_ok=True)
    program = [sys.executable, "-m", "tests.parallel.program", str(folder / "cases.json"), str(results)]
    command = program if size == 1 else [MPIEXEC, "-n", str(size), *program]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=TOP, env=environ, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(results.read_text())
