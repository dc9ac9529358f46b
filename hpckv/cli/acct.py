"""`hpckv acct`: `sacct` for cache hits."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hpckv.cli.acct_actions import balance_question, print_balance, print_disk, write_prometheus
from hpckv.cli.acct_print import Form, print_answer, print_definitions
from hpckv.cli.acct_report import Destination, write_report
from hpckv.cli.show import progress, user_name
from hpckv.errors import AccessError, ConfigError

_log = logging.getLogger(__name__)

_FIELD = re.compile(r"(?P<name>[^%]+%?)(?:%(?P<width>-?\d+))?")


def acct(
    *,
    starttime: Annotated[
        str | None, typer.Option("-S", "--starttime", help="From when on: today unless given, with -j ever.")
    ] = None,
    endtime: Annotated[str, typer.Option("-E", "--endtime", help="Until when.")] = "now",
    user: Annotated[str | None, typer.Option("-u", "--user", help="These users, with commas between.")] = None,
    everybody: Annotated[bool, typer.Option("-a", "--allusers", help="Everybody's jobs, not only one's own.")] = False,
    account: Annotated[str | None, typer.Option("-A", "--accounts", help="These Slurm accounts.")] = None,
    jobs: Annotated[str | None, typer.Option("-j", "--jobs", help="These jobs: 7, or a task of an array, 7_3.")] = None,
    partition: Annotated[str | None, typer.Option("-r", "--partition", help="These partitions.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="These models, by their folders' names.")] = None,
    project: Annotated[str | None, typer.Option("--project", help="Stores of these Unix groups.")] = None,
    allocations: Annotated[
        bool, typer.Option("-X", "--allocations", help="One line a job, as is always printed.")
    ] = False,
    group: Annotated[
        str,
        typer.Option(
            "--group-by",
            help="job, user, account, project, model, gpu, replica, hour, day, week, month, writer, or pair of writer and reader.",
        ),
    ] = "job",
    fields: Annotated[
        str | None, typer.Option("-o", "--format", help="Columns, with %20 a width; $HPCKV_ACCT_FORMAT.")
    ] = None,
    helpformat: Annotated[bool, typer.Option("-e", "--helpformat", help="Say what each column is.")] = False,
    no_header: Annotated[bool, typer.Option("-n", "--noheader", help="No header line.")] = False,
    parsable: Annotated[bool, typer.Option("-p", "--parsable", help="| between fields and at the end.")] = False,
    parsable2: Annotated[bool, typer.Option("-P", "--parsable2", help="| between fields.")] = False,
    delimiter: Annotated[str, typer.Option("--delimiter", help="Instead of | with -p and -P.")] = "|",
    units: Annotated[str | None, typer.Option("--units", help="Counts and bytes in K, M, G, T or P.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values.")] = False,
    store: Annotated[
        list[str] | None, typer.Option("--store", help="Stores; $HPCKV_STORE, or the site file's, unless given.")
    ] = None,
    run: Annotated[list[str] | None, typer.Option("--run", help="Directories of runs without a store.")] = None,
    site: Annotated[str | None, typer.Option("--site", help="Site file with prices; $HPCKV_SITE.")] = None,
    report: Annotated[
        str | None, typer.Option("--report", help="Write a page with plots and their tables to this HTML file.")
    ] = None,
    png: Annotated[str | None, typer.Option("--png", help="Write the same plots as PNG files to this folder.")] = None,
    rollup: Annotated[
        bool, typer.Option("--rollup", help="Roll closed months up, as the store's owner, and print what was done.")
    ] = False,
    reconcile: Annotated[
        bool, typer.Option("--reconcile", help="Set jobs beside sacct; exit code 3 if something does not agree.")
    ] = False,
    prom: Annotated[
        Path | None,
        typer.Option("--prom", metavar="FILE", help="Everybody's sums for node_exporter, since ever.", readable=False),
    ] = None,
    disk: Annotated[
        bool, typer.Option("--disk", help="What the store's files cost, by user, or --group-by namespace.")
    ] = False,
    balance: Annotated[
        bool, typer.Option("--balance", help="What the site's command says is left, beside what jobs cost.")
    ] = False,
) -> None:
    """Who computed, who hit whose cache, and what it saved: `sacct` for prefixes.

    Example: hpckv acct -S now-7days --group-by user
    """
    action = _one_of(
        {"--rollup": rollup, "--reconcile": reconcile, "--prom": prom, "--disk": disk, "--balance": balance}
    )
    filters = {"-u": user, "-A": account, "-r": partition, "-j": jobs, "--model": model, "--project": project}
    of_prom = {"--group-by": group != "job", "-o": fields, "--json": as_json, "--csv": as_csv, "-P": parsable2}
    _refuse({**filters, **(of_prom if prom else {})}, action)
    if helpformat:
        print_definitions(_known(action, group))
        return
    of_table = {"-o": fields, "-n": no_header, "-p": parsable, "-P": parsable2, "--units": units}
    of_table |= {"--group-by": group != "job", "--json": as_json, "--csv": as_csv, action: action}
    destination = Destination.of(report, png, of_table)
    site_file = site or os.environ.get("HPCKV_SITE")
    stores = _stores(store, site_file, run)
    if rollup:
        _roll_up(stores, as_json=as_json)
        return
    from hpckv.usage.gather import gather
    from hpckv.usage.points import read_points
    from hpckv.usage.query import Accounts, Question
    from hpckv.usage.timespec import parse_time

    wanted = _wanted(fields or "", action, group)
    is_sum = group != "job" or balance or destination is not None
    is_of_all = (everybody or is_sum) and not user
    question = Question(
        start=parse_time(starttime or ("1970-01-02" if jobs or prom or disk else "today"), "-S"),
        end=parse_time(endtime, "-E") + (endtime == "now"),  # with what has just been written
        group=group,
        columns=[column for column, _ in wanted],
        uids=None if is_of_all else _uids(user),
        accounts=_list(account),
        jobs=_list(jobs),
        partitions=_list(partition),
        models=_list(model),
        projects=_list(project),
    )
    points = read_points(Path(site_file) if site_file else None)
    runs = [Path(path) for path in run or ()]
    form = Form(not no_header, as_json, as_csv, parsable or parsable2, parsable, delimiter, units)
    if reconcile:
        from hpckv.cli.acct_reconcile import reconcile_with_slurm

        raise typer.Exit(reconcile_with_slurm(question, stores, runs, wanted, form))
    if prom:
        write_prometheus(prom, question, stores, runs, points)
        return
    if disk:
        print_disk(question, stores, points, wanted, form)
        return
    if balance:
        question = balance_question(question)
    found = gather(stores, runs, question.start, question.end, question.uids)
    accounts = Accounts(found, points, user_name)
    for oddity in found.oddities:
        _log.warning("%s: %s", oddity.path, oddity.what)
    if destination is not None:
        at = Path(site_file) if site_file else None
        write_report(destination, accounts, question, found, stores=stores, runs=runs, site=at)
        return
    answer = accounts.ask(question)
    if answer.unpriced:
        _log.warning("%d records are of no price in %s, and count 0 points", answer.unpriced, site_file)
    if balance:
        print_balance(question, points, answer, form)
    else:
        print_answer(answer, [width for _, width in wanted], form, found.oddities)


def _one_of(actions: Mapping[str, object]) -> str:
    """The one that was asked for, or nothing; raises `ConfigError` for two."""
    asked = [flag for flag, value in actions.items() if value]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)}: one at a time")
    return asked[0] if asked else ""


def _refuse(flags: Mapping[str, object], action: str) -> None:
    """Raise `ConfigError` for what would be asked for in vain."""
    for flag, value in flags.items():
        if value and action in ("--prom", "--disk"):
            raise ConfigError(f"{flag} does not go with {action}, which is about everybody and everything")


def _known(action: str, group: str) -> Mapping[str, Any]:
    """Columns by their names in lower case; raises `ConfigError` for a wrong group."""
    if action == "--disk":
        from hpckv.usage.disk import COLUMNS as OF_DISK

        return OF_DISK
    from hpckv.usage.columns import BY_WRITER, COLUMNS, GROUPS, WRITER_COLUMNS

    if group not in GROUPS:
        raise ConfigError(f"--group-by {group}: expected one of {', '.join(GROUPS)}")
    if action == "--reconcile":
        from hpckv.cli.acct_reconcile import COLUMNS as RECONCILED

        return RECONCILED
    return WRITER_COLUMNS if group in BY_WRITER else COLUMNS


def _stores(given: Sequence[str] | None, site: str | None, runs: Sequence[str] | None) -> list[Path]:
    """Folders of stores, all checked to be ones; raises `ConfigError`, `StoreError`."""
    from hpckv.schema import read_yaml
    from hpckv.store.root import StoreRoot

    names = list(given or ()) or list(filter(None, [os.environ.get("HPCKV_STORE")]))
    if not names and not runs and site:
        defaults = read_yaml(Path(site)).get("defaults") or {}
        section = defaults.get("store") if isinstance(defaults, dict) else None
        shared = section.get("shared") if isinstance(section, dict) else None
        names = [str(shared)] if shared else []
    if not names and not runs:
        raise ConfigError(
            "whose ledger? give --store or --run, set HPCKV_STORE, or store.shared in the site file's defaults"
        )
    for run in runs or ():
        if not Path(run).is_dir():
            raise ConfigError(f"--run {run}: no such folder")
        if not os.access(run, os.R_OK | os.X_OK):
            raise AccessError(f"--run {run}: permission denied")
    return [StoreRoot.open(Path(name)).layout.root for name in names]


def _roll_up(stores: Sequence[Path], *, as_json: bool) -> None:
    from hpckv.store.root import StoreRoot
    from hpckv.usage.rollup import closed_months, roll_up

    months = [(root, month) for root in map(StoreRoot.open, stores) for month in closed_months(root)]
    done: list[dict[str, Any]] = []
    with progress("months", len(months)) as step:
        for root, month in months:
            count, oddities = roll_up(root, month)
            store = str(root.layout.root)
            done.append({"store": store, "month": month, "records": count, "oddities": len(oddities)})
            for oddity in oddities:
                _log.warning("%s: %s", oddity.path, oddity.what)
            step()
    if as_json:
        typer.echo(json.dumps(done))
        return
    for line in done:
        typer.echo(f"{line['store']} {line['month']}: {line['records']:,} records, {line['oddities']} oddities")
    if not done:
        typer.echo("no month is over")


def _wanted(fields: str, action: str, group: str) -> list[tuple[Any, int | None]]:
    """Columns of -o, else the environment's if all are known in this group, and their widths; empty for the default ones."""
    from hpckv.usage.columns import COLUMNS, WRITER_COLUMNS

    known = _known(action, group)
    if fields or action:
        flags = ["--group-by", group] if known is WRITER_COLUMNS else [action]
        return _columns("-o", fields, known, " ".join(filter(None, ["hpckv acct -e", *flags])))
    variable = "HPCKV_ACCT_FORMAT"
    of_all_groups = {**COLUMNS, **WRITER_COLUMNS, **known}
    asked = _columns(variable, os.environ.get(variable, ""), of_all_groups, "hpckv acct -e")
    return asked if all(column in known.values() for column, _ in asked) else []


def _columns(source: str, text: str, known: Mapping[str, Any], listing: str) -> list[tuple[Any, int | None]]:
    """What `text` names; raises `ConfigError` with `source`, where it was said, and the command that lists what is known."""
    found = []
    for field in filter(None, map(str.strip, text.split(","))):
        matched = _FIELD.fullmatch(field)
        name, width = (matched["name"].lower(), matched["width"]) if matched else (field, None)
        column = known.get(name) or (known.get(f"{name}%") if width else None)  # Hit%10 as well as Hit%%10
        if column is None:
            raise ConfigError(f"{source} {field}: no such column; {listing} lists them")
        found.append((column, int(width) if width else None))
    return found


def _uids(users: str | None) -> list[int]:
    import pwd

    if users is None:
        return [os.getuid()]
    found = []
    for name in _list(users):
        try:
            found.append(int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid)
        except KeyError:
            raise ConfigError(f"-u {name}: no such user") from None
    return found


def _list(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]
