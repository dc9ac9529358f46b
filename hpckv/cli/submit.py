"""`hpckv submit`: the same run through Slurm, with Slurm's own flags. No torch: it runs on a login node."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from hpckv.cli.show import progress
from hpckv.launch.submit import SubmitOptions, Submitted, load_submit, prepare
from hpckv.launch.submit import submit as submit_run
from hpckv.launch.wait import wait_for_run


def _slurm(*names: str, help_text: str, metavar: str = "TEXT") -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(*names, help=help_text, metavar=metavar, rich_help_panel="Slurm")
    return option


def submit(
    runfile: Annotated[Path, typer.Argument(readable=False, metavar="RUN.yaml", help="The run file.")],
    sbatch: Annotated[
        list[str] | None, typer.Argument(metavar="[-- SBATCH...]", help="Further options of sbatch, after --.")
    ] = None,
    *,
    account: Annotated[str | None, _slurm("-A", "--account", help_text="The project that pays.")] = None,
    partition: Annotated[str | None, _slurm("-p", "--partition", help_text="Partition.")] = None,
    qos: Annotated[str | None, _slurm("-q", "--qos", help_text="Quality of service.")] = None,
    time: Annotated[
        str | None, _slurm("-t", "--time", help_text="Time limit of one job; the run goes on in the next.")
    ] = None,
    nodes: Annotated[int | None, _slurm("-N", "--nodes", help_text="Nodes.", metavar="N")] = None,
    ntasks: Annotated[
        int | None, _slurm("-n", "--ntasks", help_text="Ranks; as parallel: says unless given.", metavar="N")
    ] = None,
    cpus: Annotated[
        int | None, _slurm("-c", "--cpus-per-task", help_text="CPU cores of each rank.", metavar="N")
    ] = None,
    constraint: Annotated[str | None, _slurm("-C", "--constraint", help_text="Features of the nodes.")] = None,
    gres: Annotated[str | None, _slurm("--gres", help_text="Generic resources, for example gpu:a100:4.")] = None,
    gpus: Annotated[str | None, _slurm("--gpus-per-node", help_text="GPUs of each node.", metavar="[TYPE:]N")] = None,
    mem: Annotated[str | None, _slurm("--mem", help_text="Memory of each node.", metavar="SIZE")] = None,
    tmp: Annotated[str | None, _slurm("--tmp", help_text="Room on each node's disk.", metavar="SIZE")] = None,
    job_name: Annotated[str | None, _slurm("-J", "--job-name", help_text="What squeue shows.")] = None,
    log: Annotated[
        str | None, _slurm("-o", "--log", help_text="The job's log (--output is the run directory).", metavar="FILE")
    ] = None,
    error: Annotated[str | None, _slurm("-e", "--error", help_text="Standard error.", metavar="FILE")] = None,
    dependency: Annotated[str | None, _slurm("-d", "--dependency", help_text="Start after other jobs.")] = None,
    reservation: Annotated[str | None, _slurm("--reservation", help_text="Reservation.")] = None,
    array: Annotated[
        str | None, _slurm("-a", "--array", help_text="So many jobs work on the run together.", metavar="LIST")
    ] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one setting.")] = None,
    batch_input: Annotated[
        str | None, typer.Option("--input", metavar="FILE", help="Prompts, instead of the run file's.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="DIR", help="Run directory, instead of the run file's.")
    ] = None,
    skip_bad_lines: Annotated[bool, typer.Option("--skip-bad-lines", help="Answer the rest of the lines.")] = False,
    allow_errors: Annotated[bool, typer.Option("--allow-errors", help="Exit 0 also when requests failed.")] = False,
    join: Annotated[bool, typer.Option("--join", help="Work on it together with other jobs that do.")] = False,
    continuation: Annotated[
        Literal["requeue", "chain", "none"] | None,
        typer.Option("--continue", help="When the time is up and requests are left."),
    ] = None,
    executor: Annotated[
        Literal["slurm", "local", "debug"] | None,
        typer.Option("--executor", help="Slurm, this machine, or this process."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; submit and write nothing.")] = False,
    parsable: Annotated[bool, typer.Option("--parsable", help="Print the job's number only.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until the run is over; its exit code is the command's.")
    ] = False,
) -> None:
    """Submit a run to Slurm. When its time is up it goes on by itself until every prompt is answered.

    \b
    Example: hpckv submit RUN.yaml -A proj -p gpu -t 02:00:00 --gpus-per-node 1 -c 8 --mem 64G
    Example: hpckv submit RUN.yaml -N 2 --set parallel.tp=4 --set parallel.pp=2 --dry-run -- --exclusive

    What is not given stands in the run file's slurm: section, or in the site file's. Exit codes: 0 submitted; 64 wrong flag or
    setting; 65 bad input line; 66 missing input or image; 69 sbatch refused, or model unusable; 73 run directory cannot be
    written; 78 no Slurm here.
    """
    flags: dict[str, object] = {
        "input": batch_input,
        "output": output,
        "slurm.account": account,
        "slurm.partition": partition,
        "slurm.qos": qos,
        "slurm.time": time,
        "slurm.nodes": nodes,
        "slurm.ntasks": ntasks,
        "slurm.cpus_per_task": cpus,
        "slurm.constraint": constraint,
        "slurm.gres": gres,
        "slurm.gpus_per_node": gpus,
        "slurm.mem": mem,
        "slurm.tmp": tmp,
        "slurm.job_name": job_name,
        "slurm.log": log,
        "slurm.error": error,
        "slurm.dependency": dependency,
        "slurm.reservation": reservation,
        "slurm.array": array,
        "slurm.continuation": continuation,
    }
    config = load_submit(runfile, flags=flags, sets=sets or (), sbatch=sbatch or (), environ=os.environ)
    chosen = {"--skip-bad-lines": skip_bad_lines, "--allow-errors": allow_errors, "--join": join}
    run_flags = [name for name, is_given in chosen.items() if is_given]
    prepared = prepare(config, SubmitOptions(executor, run_flags), Path.cwd(), needs_slurm=not dry_run)
    if dry_run:
        typer.echo(prepared.text)
        return
    submitted = submit_run(prepared)
    _say(submitted, is_parsable=parsable)
    if wait:
        raise typer.Exit(_wait(submitted))


def _say(submitted: Submitted, *, is_parsable: bool) -> None:
    if is_parsable:
        typer.echo(submitted.job)
    else:
        run_folder = submitted.prepared.script.config.output
        what = "job" if submitted.local is None else "process"
        typer.echo(f"{what} {submitted.job} submitted; hpckv status {run_folder} says where it stands")
    sys.stdout.flush()


def _wait(submitted: Submitted) -> int:
    shown = 0
    with progress("answers", submitted.prepared.num_requests) as step:

        def answered(count: int) -> None:
            nonlocal shown
            for _ in range(count - shown):
                step()
            shown = max(shown, count)

        try:
            return wait_for_run(submitted, answered)
        except KeyboardInterrupt:
            sys.stderr.write(f"hpckv: no longer waiting; job {submitted.job} goes on\n")
            return 130
