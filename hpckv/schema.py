"""Strict mapping -> typed configuration, with errors that say where, what was expected, and the nearest right name.

The typing itself is msgspec's; this module turns its errors into one line for a person.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

from hpckv.errors import AccessError, ConfigError, MissingInputError
from hpckv.quantity import ByteSize

T = TypeVar("T")
SITE_SECTIONS = ("defaults", "points", "rates")

_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`(?: - at `\$\.?(?P<path>.*)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")
_OTHER = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every configuration section: immutable, keyword-only, unknown keys refused."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises `MissingInputError`, `AccessError`, or `ConfigError` with the line."""
    import yaml  # here, as most commands read none

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _strict_loader())
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file") from None
    except PermissionError:
        raise AccessError(f"{path}: permission denied") from None
    except OSError as error:
        raise MissingInputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    except (ValueError, RecursionError) as error:  # a date that is none, nesting without end
        raise ConfigError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(content).__name__}")
    return content


def read_site(site: Path) -> dict[str, Any]:
    """A site file; raises `ConfigError` for a section that there is none of, `MissingInputError`."""
    content = read_yaml(site)
    for name in content:
        if name not in SITE_SECTIONS:
            raise ConfigError(f"{site}: {name}: unknown section; a site file has {', '.join(SITE_SECTIONS)}")
    return content


def convert(content: object, into: type[T], where: str) -> T:
    """Build `into` from plain data; `where` names the source in errors (a file, a flag).

    Raises `ConfigError`: one line, the dotted path, what was expected, the nearest right name.
    """
    try:
        return msgspec.convert(content, into, dec_hook=_decode_custom)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_explain(str(error), into)}") from None


def to_plain(config: object) -> Any:
    """The reverse of `convert`: plain data, sizes as people write them."""
    return msgspec.to_builtins(config, enc_hook=str)


@cache
def _strict_loader() -> Any:
    """YAML's safe loader, that refuses a key which stands twice: the later one would win without a word."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if key.value in seen and isinstance(key.value, str) and key.value != "<<":
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value}: stands twice", key.start_mark)
                seen.add(key.value if isinstance(key.value, str) else id(key))
            return super().construct_mapping(node, deep)

    return Loader


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` or the list of known names, to end an error line with."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(names)


def set_dotted(content: dict[str, Any], assignment: str) -> None:
    """Apply one `--set a.b=c`; the value is read as YAML."""
    import yaml

    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {assignment}: expected section.key=value, for example --set engine.max_requests=64")
    *sections, key = path.split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {assignment}: {section} is not a section")
        content = inner
    try:
        content[key] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"--set {assignment}: {text!r} is not a value that YAML can read") from None


def _decode_custom(kind: type, value: object) -> object:
    if kind is ByteSize:
        try:
            return ByteSize.parse(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
    raise NotImplementedError(kind)  # msgspec's own signal for "not mine"


def _explain(message: str, root: type) -> str:
    if unknown := _UNKNOWN.fullmatch(message):
        path, name = unknown["path"] or "", unknown["name"]
        where = f"{path}.{name}" if path else name
        return f"{where}: unknown key; {nearest(name, _field_names(root, path))}"
    other = _OTHER.fullmatch(message)
    assert other is not None
    path, what = other["path"] or "", other["what"]
    if missing := _MISSING.fullmatch(what):
        return f"{path}.{missing['name']}: is missing".lstrip(".")
    if what.startswith("Invalid enum value"):
        what += _choices(root, path)
    return f"{path or 'file'}: {what}"


def _field_names(root: Any, path: str) -> list[str]:
    """Of the section at `path`, such as `prices[0]`."""
    current = _section(root)
    for part in filter(None, re.sub(r"\[\d+\]", "", path).split(".")):
        for field in msgspec.structs.fields(current) if current else ():
            if field.encode_name == part and (inner := _section(field.type)):
                current = inner
    return [field.encode_name for field in msgspec.structs.fields(current)] if current else []


def _section(kind: Any) -> Any:
    """The configuration class in a type: itself, of a list's items, of what may be left out; None if there is none."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind
    return next(filter(None, map(_section, get_args(kind))), None)


def _choices(root: Any, path: str) -> str:
    """The words that may stand at `path`, to end an error line with."""
    section, _, name = path.rpartition(".")
    current = _section(root)
    for part in filter(None, re.sub(r"\[\d+\]", "", section).split(".")):
        types = {field.encode_name: field.type for field in msgspec.structs.fields(current)} if current else {}
        current = _section(types.get(part))
    kinds = {field.encode_name: field.type for field in msgspec.structs.fields(current)} if current else {}
    literals = [kind for kind in (kinds.get(name), *get_args(kinds.get(name))) if get_origin(kind) is Literal]
    return f"; expected {' or '.join(map(str, get_args(literals[0])))}" if literals else ""
