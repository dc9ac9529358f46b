#!/usr/bin/env python3
"""From `sbatch` to the first token, part by part: as an ordinary user of a small cluster on this machine, in an image.

    containers/build.sh cpu -o hpckv.sif
    python bench/first_token.py --sif hpckv.sif --rounds 5

The cluster is the tests' (a real Slurm, hosts that are network namespaces, a GlusterFS that each mounts); needs root, and what
`sh tests/system_packages.sh` installs. One request of one token; the first job warms image and page cache and is not counted.
Slurm's own times are whole seconds, so the parts are moments that the batch script, the container's start and the run leave in
`summary.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.cli.runs import chat_lines, write_run
from tests.cluster.apptainer import apptainer
from tests.cluster.site import Site, site
from tests.cluster.slurm import NODES, slurm

TOP = Path(__file__).parents[1]
PARTS = {
    "script": "Slurm: sbatch, queue, the batch script's start",
    "step": "batch script: settings, container, srun --mpi=list",
    "task": "Slurm: srun to the task's start",
    "process": "container: from its command to Python",
    "run": "imports: the command line; MPI",
    "imported": "imports: torch",
    "checked": "checks: model, store, input, plan",
    "loaded": "weights, pages",
    "first_answer": "first token",
}
"""What has happened when a moment of `summary.json` is reached."""


def one_start(centre: Site, image: Path, model: Path, name: str) -> dict[str, float]:
    """Seconds of each part of one job."""
    alice = centre.people["alice"]
    folder = alice.home / name
    folder.mkdir()
    store = {"shared": str(alice.home / "kv"), "local": "none"}
    run_file = write_run(folder, model, chat_lines(1), sampling={"max_tokens": 1}, store=store)
    for path in (folder, run_file, folder / "in.jsonl"):
        shutil.chown(path, alice.name, alice.group)
    submitted = time.time()
    job = centre.sbatch("alice", "single_a100.sh", run_file, flags=("--partition=a100",), HPCKV_SIF=str(image))
    states = centre.wait(job)
    if states != {("COMPLETED", "0:0")}:
        raise SystemExit(f"job {job}: {states}\n{centre.logs()}")
    times = json.loads((folder / "out" / "summary.json").read_text())["times"]
    found, before = {}, submitted
    for moment in PARTS:
        found[moment], before = times[moment] - before, times[moment]
    return found


def main() -> None:
    """Bring the cluster up, measure, print medians."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--sif", type=Path, required=True, help="an image of hpckv, built from this checkout")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--model", type=Path, default=TOP / "examples" / "recall-1m")
    args = ap.parse_args()
    apptainer()
    with slurm(NODES) as cluster, site(cluster) as centre:
        image, model = centre.shared / "hpckv.sif", centre.shared / "model"
        shutil.copy(args.sif, image)
        image.chmod(0o755)
        shutil.copytree(args.model, model)
        for path in (model, *model.iterdir()):
            path.chmod(0o755)
        rounds = [one_start(centre, image, model, f"run-{number}") for number in range(args.rounds + 1)][1:]
    print("| part | seconds, median | least to most |\n|---|---|---|")
    for moment, words in PARTS.items():
        seconds = [found[moment] for found in rounds]
        print(f"| {words} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |")
    whole = [sum(found.values()) for found in rounds]
    print(f"| sbatch to first token | {statistics.median(whole):.2f} | {min(whole):.2f} to {max(whole):.2f} |")


if __name__ == "__main__":
    main()
