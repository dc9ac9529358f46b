"""`hpckv store`: the shared store's life. No torch, except for `warm`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hpckv.cli.show import group_id, group_name, print_facts, progress, user_name
from hpckv.cli.store_policy import distrust, rotate, share
from hpckv.cli.store_warm import warm
from hpckv.errors import AccessError, ConfigError, StoreError
from hpckv.quantity import ByteSize, format_bytes
from hpckv.schema import to_plain

store_app = typer.Typer(help="Make, inspect and tend block stores.", no_args_is_help=True, rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(readable=False, metavar="DIR", help="The store.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
EXIT_FOUND = 3

for _verb in (warm, share, distrust, rotate):
    store_app.command()(_verb)


@store_app.callback()
def _group() -> None:
    """Make, inspect and tend block stores."""


@store_app.command()
def init(
    path: Folder,
    *,
    group: Annotated[str | None, typer.Option(help="Unix group that shares it; without: private to you.")] = None,
    quota: Annotated[str | None, typer.Option(help="Most bytes in all, like 2TiB.")] = None,
    files: Annotated[int | None, typer.Option(help="Most files in all.")] = None,
    user_quota: Annotated[str | None, typer.Option(help="Most bytes of each user.")] = None,
    user_files: Annotated[int | None, typer.Option(help="Most files of each user.")] = None,
    free: Annotated[str, typer.Option(help="Write nothing while the filesystem has less free.")] = "0",
    keep_days: Annotated[float, typer.Option(help="Unused for longer goes first.")] = 30.0,
    trust: Annotated[str, typer.Option(help="project: read every member's blocks; self: only your own.")] = "project",
    bridging: Annotated[
        str, typer.Option(help="Blocks of other dtypes that runs may convert and use: off, exact or any.")
    ] = "exact",
    as_json: AsJson = False,
) -> None:
    """Make a store for a project, and check that the filesystem and the group really give what sharing needs.

    Example: hpckv store init /lustre/proj/kv --group proj --quota 2TiB --files 8000
    """
    from hpckv.schema import convert
    from hpckv.store.policy import Quota, StorePolicy
    from hpckv.store.root import StoreRoot

    if StoreRoot.exists(path):
        StoreRoot.open(path)  # says so if this user may not look
        raise StoreError(f"store {path}: there is one already; see: hpckv store info {path}")
    if trust not in ("project", "self"):
        raise ConfigError(f"--trust {trust}: expected project or self")
    if bridging not in ("off", "exact", "any"):
        raise ConfigError(f"--bridging {bridging}: expected off, exact or any")
    limits = {"bytes": quota, "files": files, "user_bytes": user_quota, "user_files": user_files, "free": free}
    policy = StorePolicy.new(
        group=group_id(group) if group else None,
        quota=convert({name: value for name, value in limits.items() if value is not None}, Quota, "quota"),
        keep_days=keep_days,
        trust=trust,
        bridging=bridging,
    )
    root = StoreRoot.create(path, policy)
    root.make_own_folder(root.layout.user(os.getuid()))  # proves that a member can
    if as_json:
        typer.echo(json.dumps(to_plain(root.policy), indent=2))
        return
    who = f"shared by group {group}" if group else "private to you"
    typer.echo(f"{path}: a new store, {who}. In run files: store: {{shared: {path}}}")


@store_app.command()
def info(path: Folder, *, as_json: AsJson = False) -> None:
    """Owner, group, quota and what of it is in use.

    Example: hpckv store info /lustre/proj/kv
    """
    from hpckv.store.inspect import audit_reports, unsafe_folders
    from hpckv.store.local_disk import filesystem_type

    root, survey = _open(path)
    quota = root.policy.quota
    record: dict[str, Any] = {
        **to_plain(root.policy),
        "owner": root.owner,
        "filesystem": filesystem_type(path),
        "used": {
            "bytes": survey.num_bytes(),
            "files": survey.num_files(),
            "segments": len(survey.segments()),
            "users": sorted({f.uid for f in survey.files.values()}),
            "free_bytes": survey.free_bytes(),
        },
        "audits": audit_reports(survey),
        "warnings": [f"{folder}: {what}" for folder, what in unsafe_folders(root)],
    }
    for writer, auditors in record["audits"].items():
        who = ", ".join(map(user_name, auditors))
        record["warnings"].append(
            f"blocks of {user_name(writer)} were found wrong by audits of {who}; if you agree: hpckv store distrust {path} {writer}"
        )
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    used = record["used"]
    print_facts(
        {
            "store": root.policy.uuid,
            "owner": user_name(root.owner),
            "shared by": group_name(root.policy.group),
            "filesystem": record["filesystem"],
            "key epoch": root.policy.epoch,
            "bytes": f"{format_bytes(used['bytes'])} of {_bound(quota.bytes, format_bytes)}",
            "files": f"{used['files']:,} of {_bound(quota.files, '{:,}'.format)}",
            "segments": f"{used['segments']:,}",
            "free": f"{format_bytes(used['free_bytes'])}, to be left: {format_bytes(quota.free)}",
            "users": ", ".join(map(user_name, used["users"])) or "none yet",
            "kept unused": f"{root.policy.keep_days:g} days",
            "trust": root.policy.trust,
            "not trusted": ", ".join(map(user_name, root.policy.distrusted)) or "nobody",
            "bridging": root.policy.bridging,
        }
    )
    for warning in record["warnings"]:
        typer.echo(f"warning: {warning}")


@store_app.command()
def ls(path: Folder, *, as_json: AsJson = False) -> None:
    """What is in it: a line for each model and representation.

    Example: hpckv store ls /lustre/proj/kv
    """
    from hpckv.store.inspect import namespaces

    _, survey = _open(path)
    rows: list[dict[str, Any]] = [
        {
            "namespace": view.name,
            "model": view.model,
            "representation": view.representation,
            "segments": len(view.segments),
            "bytes": view.num_bytes,
            "users": view.users,
            "heat": round(view.use.heat, 1),
            "last_used": view.use.last,
        }
        for view in namespaces(survey)
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("namespace", "model", "dtype block mode", "files", "size", "users", "heat", box=None)
    for row in rows:
        users, size = ", ".join(map(user_name, row["users"])), format_bytes(row["bytes"])
        table.add_row(
            row["namespace"][:10],
            row["model"],
            row["representation"],
            str(row["segments"]),
            size,
            users,
            f"{row['heat']:.0f}",
        )
    Console(highlight=False).print(table)


@store_app.command()
def du(path: Folder, *, as_json: AsJson = False) -> None:
    """Bytes and files of each user.

    Example: hpckv store du /lustre/proj/kv
    """
    root, survey = _open(path)
    rows: list[dict[str, Any]] = [
        {"uid": uid, "user": user_name(uid), "bytes": survey.num_bytes(uid), "files": survey.num_files(uid)}
        for uid in sorted({f.uid for f in survey.files.values()})
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("user", "size", "files", "of own quota", box=None)
    for row in sorted(rows, key=lambda row: -row["bytes"]):
        bound = root.policy.quota.user_bytes
        share = f"{100 * row['bytes'] / bound:.0f} %" if bound else "-"
        table.add_row(row["user"], format_bytes(row["bytes"]), f"{row['files']:,}", share)
    table.add_row("all", format_bytes(survey.num_bytes()), f"{survey.num_files():,}", "")
    Console(highlight=False).print(table)


@store_app.command()
def check(
    path: Folder,
    *,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Delete your own files that do not verify; their blocks are computed again."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read and verify every byte. Exit code 0: clean; 3: something was found, each named.

    Example: hpckv store check /lustre/proj/kv --repair
    """
    from hpckv.store.inspect import check as verify
    from hpckv.store.inspect import unsafe_folders

    root, survey = _open(path)
    with progress("files", len(survey.files)) as step:
        report = verify(root, survey, on_file=lambda _: step())
    findings = [(str(f.file.path), f.what, f.file.uid) for f in report.findings]
    findings += [(str(folder), what, root.owner) for folder, what in unsafe_folders(root)]
    repaired = []
    if repair:
        for finding in report.findings:
            if finding.file.uid == os.getuid():
                finding.file.path.unlink(missing_ok=True)
                repaired.append(str(finding.file.path))
    if as_json:
        keys = ("path", "what", "uid")
        record = {
            "segments": report.segments,
            "blocks": report.blocks,
            "bytes": report.num_bytes,
            "findings": [dict(zip(keys, finding, strict=True)) for finding in findings],
            "repaired": repaired,
        }
        typer.echo(json.dumps(record, indent=2))
    else:
        for name, what, uid in findings:
            typer.echo(f"{name}: {what} ({user_name(uid)}{', deleted' if name in repaired else ''})")
        size = format_bytes(report.num_bytes)
        typer.echo(f"{report.segments:,} segments, {report.blocks:,} blocks, {size}: {len(findings)} findings")
    raise typer.Exit(EXIT_FOUND if findings else 0)


@store_app.command()
def gc(path: Folder, *, as_json: AsJson = False) -> None:
    """Delete what of yours has expired or exceeds the quota, and sweep what your dead jobs left.

    Example: hpckv store gc /lustre/proj/kv
    """
    from hpckv.store.collect import Collector

    root, _ = _open(path)
    try:
        deleted = Collector(root).collect()
    except OSError as error:
        raise AccessError(f"store {path}: {error.strerror}") from None
    record = {"files": len(deleted), "bytes": sum(file.num_bytes for file in deleted)}
    if as_json:
        typer.echo(json.dumps(record))
    else:
        typer.echo(f"{record['files']} files deleted, {format_bytes(record['bytes'])}")


@store_app.command()
def compact(
    path: Folder,
    *,
    segment_size: Annotated[str, typer.Option(help="About this large.")] = "256MiB",
    as_json: AsJson = False,
) -> None:
    """Rewrite your own small segments into few large ones, and keep blocks that lie twice once.

    Example: hpckv store compact /lustre/proj/kv
    """
    from hpckv.store.compact import compact as rewrite

    root, survey = _open(path)
    with progress("segments", len(survey.segments(os.getuid()))) as step:
        try:
            report = rewrite(root, target_bytes=ByteSize.parse(segment_size), on_file=lambda _: step())
        except OSError as error:
            raise AccessError(f"store {path}: {error.strerror}") from None
    if as_json:
        typer.echo(json.dumps(vars(report)))
    else:
        typer.echo(
            f"{report.read_segments} segments became {report.written_segments}; {report.duplicate_blocks} duplicate blocks; "
            f"{format_bytes(report.freed_bytes)} freed"
        )


@store_app.command()
def purge(
    path: Folder,
    *,
    namespace: Annotated[str | None, typer.Option(help="Only this one (as `ls` names it, or its beginning).")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without, only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Erase your own blocks: all, or of one namespace. Others' are theirs.

    Example: hpckv store purge /lustre/proj/kv --namespace 3fa9 --yes
    """
    from hpckv.store.inspect import namespaces

    _, survey = _open(path)
    views = [v for v in namespaces(survey) if namespace is None or v.name.startswith(namespace)]
    if namespace is not None and not views:
        raise ConfigError(f"--namespace {namespace}: there is none of that name; see: hpckv store ls {path}")
    files = [file for view in views for file in view.files if file.uid == os.getuid()]
    record = {"files": len(files), "bytes": sum(file.num_bytes for file in files), "deleted": yes}
    if yes:
        for file in files:
            file.path.unlink(missing_ok=True)
    if as_json:
        typer.echo(json.dumps(record))
    else:
        hint = "erased" if yes else "would be erased; add --yes to do it"
        typer.echo(f"{record['files']} files, {format_bytes(record['bytes'])} {hint}")


def _open(path: Path) -> tuple[Any, Any]:
    """The store and a fresh survey of it."""
    from hpckv.store.root import StoreRoot
    from hpckv.store.survey import Survey

    root = StoreRoot.open(path)
    survey = Survey(root.layout)
    try:
        survey.refresh()
    except PermissionError as error:
        raise AccessError(f"store {path}: {error.filename}: permission denied") from None
    except OSError as error:
        raise StoreError(f"store {path}: {error.strerror}") from None
    return root, survey


def _bound(value: int | None, form: Callable[[int], str]) -> str:
    return "no bound" if value is None else form(value)
