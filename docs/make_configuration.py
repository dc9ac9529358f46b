#!/usr/bin/env python3
"""Write docs/configuration.md from the docstrings under the configuration fields.

make docs          # tests/docs/test_documents.py fails when it was forgotten
"""

from __future__ import annotations

import ast
import inspect
import types
import typing
from pathlib import Path

import msgspec

from hpckv.workload.runfile import RunConfig

TARGET = Path(__file__).parent / "configuration.md"

HEAD = """# The run file

Written by `make docs` from the docstrings of the configuration classes. A run file is YAML; an unknown key is refused with
the nearest right name. Precedence: flag > `HPCKV_*` environment > run file > site file (`defaults:`) > default.

Environment: `HPCKV_STORE` sets `store.shared`, `HPCKV_LOCAL` `store.local`, `HPCKV_RUN_DIR` `output`, `HPCKV_SITE` `site`,
`HPCKV_SIF` `container.image`.

Sizes are written `512MiB`, `200GiB`, `2TB`, or as a number of bytes.
"""


def field_docs(config: type) -> dict[str, str]:
    """The string literal under each field of a class."""
    body = ast.parse(inspect.getsource(config)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs


def type_name(kind: object) -> str:
    """A type as a user would say it."""
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is list:
        return f"list of {type_name(typing.get_args(kind)[0])}"
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "ByteSize": "size"}
    name = getattr(kind, "__name__", str(kind))
    return names.get(name, name)


def section_of(kind: object) -> type | None:
    """The configuration class in a field's type."""
    parts = [kind, *typing.get_args(kind)]
    return next((p for p in parts if isinstance(p, type) and issubclass(p, msgspec.Struct)), None)


def default_of(field: msgspec.structs.FieldInfo) -> str:
    """A field's default as it would be written."""
    if field.default is not msgspec.NODEFAULT:
        return "" if field.default is None else f"`{field.default}`"
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{field.default_factory()}`"
    return "required"


def render() -> str:
    """The whole document."""
    rows = [f for f in msgspec.structs.fields(RunConfig) if section_of(f.type) is None]
    parts = [HEAD, "## Top level\n\n" + table(rows, field_docs(RunConfig))]
    return "\n".join(parts + sections(RunConfig, ""))


def sections(config: type, above: str) -> list[str]:
    """A part for every section of a class, and for theirs."""
    parts = []
    for field in msgspec.structs.fields(config):
        section = section_of(field.type)
        if section is None:
            continue
        rows = [f for f in msgspec.structs.fields(section) if section_of(f.type) is None]
        about = inspect.getdoc(section) or ""
        parts.append(f"## `{above}{field.name}`\n\n{about}\n\n" + table(rows, field_docs(section)))
        parts += sections(section, f"{above}{field.name}.")
    return parts


def table(fields: typing.Sequence[msgspec.structs.FieldInfo], docs: dict[str, str]) -> str:
    """One row a field."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{f.name}` | {type_name(f.type)} | {default_of(f)} | {docs.get(f.name, '')} |" for f in fields]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
