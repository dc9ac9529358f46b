"""What a ledger record holds (`docs/ledger-format.md`, 2): who, and how much since the record before."""

from __future__ import annotations

import os
import platform
import pwd
import secrets
from collections.abc import Mapping
from operator import attrgetter, gt
from typing import Any

import msgspec

VERSION = 1
TIERS = ("device", "host", "local", "shared")
LARGEST = 2**53
"""Beyond it, JSON numbers of other programs are not exact."""


class Counters(msgspec.Struct, gc=False):  # no cycles: the collector need not look at a million of them
    """What adds up. Tokens of requests are counted when these are answered."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached: dict[str, int] = {}
    """By tier."""
    computed_tokens: int = 0
    output_tokens: int = 0
    written_tokens: int = 0
    read_bytes: dict[str, int] = {}
    written_bytes: dict[str, int] = {}
    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    gpu_s: float = 0.0
    saved_gpu_s: float = 0.0
    energy_j: float | None = None
    """Joules; None where nobody measured them, which is not 0."""
    by_writer: dict[str, int] = {}
    """Loaded tokens by the uid, in decimal, of who had written them."""

    def __sub__(self, before: Counters) -> Counters:
        """What was added since; parts of mappings that did not change are left out."""
        return Counters(**{name: _minus(getattr(self, name), getattr(before, name)) for name in self.__struct_fields__})

    def __add__(self, more: Counters) -> Counters:
        return Counters(**{name: _plus(getattr(self, name), getattr(more, name)) for name in self.__struct_fields__})

    @property
    def is_nothing(self) -> bool:
        """Whether no request was answered."""
        return not (self.requests or self.failed)


class Record(Counters, kw_only=True, gc=False):
    """One line: who, when, how much. A writer's first one, with nothing in it, is the pattern of its others."""

    writer: str
    user: str
    uid: int
    v: int = VERSION
    seq: int = 0
    t0: float = 0.0
    t1: float = 0.0
    cluster: str | None = None
    job: str | None = None
    array_job: str | None = None
    array_task: int | None = None
    restart: int = 0
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    project: str | None = None
    run: str | None = None
    host: str = ""
    model: str = ""
    model_digest: str = ""
    gpu: str = ""
    num_gpus: int = 1
    num_nodes: int = 1
    keep_s: int = 0
    prev: str = ""

    @classmethod
    def of_this_process(cls, *, rank: int = 0, environ: Mapping[str, str] = os.environ, **more: Any) -> Record:
        """Slurm's part and the kernel's; `more` is the rest."""
        array_job, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
        job, restart = environ.get("SLURM_JOB_ID"), int(environ.get("SLURM_RESTART_COUNT") or 0)
        name = f"{array_job}_{task}" if array_job else job or f"{platform.node()}-{os.getpid()}"
        return cls(
            writer=f"{name}.{restart}.{rank}.{secrets.token_hex(8)}",
            cluster=environ.get("SLURM_CLUSTER_NAME"),
            job=job,
            array_job=array_job,
            array_task=int(task) if task else None,
            restart=restart,
            user=_user_name(),
            uid=os.getuid(),
            account=environ.get("SLURM_JOB_ACCOUNT"),
            partition=environ.get("SLURM_JOB_PARTITION"),
            qos=environ.get("SLURM_JOB_QOS"),
            host=platform.node(),
            **more,
        )

    def with_counters(self, counters: Counters, *, seq: int, t0: float, t1: float, prev: str) -> Record:
        """The record of this writer that says `counters`."""
        added = {name: getattr(counters, name) for name in Counters.__struct_fields__}
        return msgspec.structs.replace(self, **added, seq=seq, t0=round(t0, 3), t1=round(t1, 3), prev=prev)

    @property
    def what_is_wrong(self) -> str:
        """Why it must not be counted, whoever wrote it; empty if it may."""
        if self.v != VERSION:
            return f"version {self.v}, this program knows {VERSION}"
        if not self.cached.keys() <= _TIERS:
            return f"unknown tiers: {', '.join(sorted(set(self.cached) - set(TIERS)))}"
        if self.prompt_tokens != sum(self.cached.values()) + self.computed_tokens:
            return f"{self.prompt_tokens} prompt tokens are not the cached and the computed ones"
        numbers, read, written = _numbers(self), self.read_bytes.values(), self.written_bytes.values()
        least = min([*numbers, *self.cached.values(), *read, *written, *self.by_writer.values()])
        if least < 0 or any(map(gt, numbers, _most)) or not (self.num_gpus and self.num_nodes):
            return "a number out of range"
        # What is cached is within the tokens of prompts.
        if sum(read) > _BYTES or sum(written) > _BYTES or sum(self.by_writer.values()) > _COUNT:
            return "a number out of range"
        if abs(self.saved_gpu_s) > _SECONDS or not 0 <= (self.energy_j or 0) <= _JOULES:
            return "a number out of range"
        if not 0 <= (self.array_task or 0) <= LARGEST or not all(map(_is_uid, self.by_writer)):
            return "a number out of range"
        if not 0 <= self.t0 <= self.t1 <= LARGEST:
            return "ends before it begins"
        return ""


IN_ORDER = Record.__struct_fields__[len(Counters.__struct_fields__) : -1] + Counters.__struct_fields__ + ("prev",)
"""Of a line's fields."""
_COUNT, _BYTES, _SECONDS, _JOULES, _DEVICES = 10**12, 10**15, 10**9, 10**13, 10**6
"""No record of an honest writer comes near them, and sums of any number of records stay exact."""
_MOST = {
    **dict.fromkeys(("seq", "restart", "keep_s"), LARGEST),
    **dict.fromkeys(("num_gpus", "num_nodes"), _DEVICES),
    **dict.fromkeys((f.name for f in msgspec.structs.fields(Counters) if f.type is int), _COUNT),
    **dict.fromkeys(("load_s", "prefill_s", "decode_s", "gpu_s"), _SECONDS),
}
_TIERS = frozenset(TIERS)
_UID_DIGITS = 16
_numbers, _most = attrgetter(*_MOST), tuple(_MOST.values())


def _is_uid(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < _UID_DIGITS


def _minus(now: Any, before: Any) -> Any:
    if not isinstance(now, dict):
        return None if now is None else now - (before or 0)
    differences = {key: now.get(key, 0) - before.get(key, 0) for key in {**now, **before}}
    return {key: value for key, value in differences.items() if value}


def _plus(one: Any, other: Any) -> Any:
    if not isinstance(one, dict):
        return one if other is None else other + (one or 0)
    sums = {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
    return {key: value for key, value in sums.items() if value}


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container that does not know this user
        return str(os.getuid())
