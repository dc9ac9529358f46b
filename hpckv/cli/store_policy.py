"""`hpckv store rotate|share|distrust`: who may read what of a store."""

from __future__ import annotations

import pwd
from pathlib import Path
from typing import Annotated

import typer

from hpckv.cli.show import group_id, user_name
from hpckv.errors import ConfigError

Folder = Annotated[Path, typer.Argument(readable=False, metavar="DIR", help="The store.")]


def rotate(path: Folder) -> None:
    """Begin a new key epoch: runs that start from now on find nothing that was stored before. Owner only.

    Example: hpckv store rotate /lustre/proj/kv
    """
    from hpckv.store.root import StoreRoot

    epoch = StoreRoot.open(path).rotate().policy.epoch
    typer.echo(f"{path}: key epoch {epoch}; what earlier epochs stored goes with its last use")


def share(
    path: Folder,
    *,
    group: Annotated[str, typer.Option("--with", metavar="GROUP", help="Unix group of the other project.")],
    revoke: Annotated[bool, typer.Option("--revoke", help="Take it back.")] = False,
) -> None:
    """Let another project read what is yours of a store: the owner the store itself, each member their own blocks.

    Its members then name the store in their run files and hit; they cannot write to it. Needs POSIX access control lists.

    Example: hpckv store share /lustre/proj/kv --with otherproj
    """
    from hpckv.store.grant import share as grant
    from hpckv.store.root import StoreRoot

    count = grant(StoreRoot.open(path), group_id(group, "--with"), revoke=revoke)
    can = "can no longer read" if revoke else "can read"
    typer.echo(f"{path}: group {group} {can} {count} files and folders of yours there")


def distrust(
    path: Folder,
    user: Annotated[str, typer.Argument(metavar="USER", help="Name or uid.")],
    *,
    undo: Annotated[bool, typer.Option("--undo", help="Trust them again.")] = False,
) -> None:
    """Let nobody read a user's blocks any more, after an audit found wrong ones, say. Owner only.

    Example: hpckv store distrust /lustre/proj/kv bob
    """
    from hpckv.store.root import StoreRoot

    uid = _uid(user)
    root = StoreRoot.open(path).distrust(uid, is_trusted=undo)
    left_out = ", ".join(map(user_name, root.policy.distrusted)) or "nobody"
    typer.echo(f"{path}: not trusted from the next start of a run on: {left_out}")


def _uid(user: str) -> int:
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(f"{user}: no such user") from None
