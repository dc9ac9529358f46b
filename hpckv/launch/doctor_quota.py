"""What `hpckv doctor` finds of quotas: as `lfs quota` and `quota` say, where there are such programs. No other is asked."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from hpckv.launch.finding import Clock, Finding, Verdict
from hpckv.quantity import format_bytes
from hpckv.store.local_disk import Mount

_PROGRAM_S = 5.0
_NEARLY = 0.9

_SECTION = re.compile(r"Disk quotas for (?P<kind>user|usr|group|grp) (?P<name>\S+) \([ug]id (?P<id>\d+)\):")
_ROW = re.compile(
    r"(?P<place>\S+)\s+"
    r"(?P<kib>\d+)\*?\s+(?P<soft_kib>\d+)\s+(?P<hard_kib>\d+)\s+(?:(?:-|\d*[a-z:]\S*)\s+)?"  # a grace period, or none
    r"(?P<files>\d+)\*?\s+(?P<soft_files>\d+)\s+(?P<hard_files>\d+)"
)


@dataclass(frozen=True)
class Quota:
    """What one user or group has on one filesystem, and may have; 0 is no limit."""

    whose: str
    num_bytes: int
    most_bytes: int
    files: int
    most_files: int

    @property
    def is_nearly_used(self) -> bool:
        pairs = ((self.num_bytes, self.most_bytes), (self.files, self.most_files))
        return any(most and used >= _NEARLY * most for used, most in pairs)

    def __str__(self) -> str:
        size = f" of {format_bytes(self.most_bytes)}" if self.most_bytes else ""
        files = f" of {self.most_files:,}" if self.most_files else ""
        return f"{self.whose}: {format_bytes(self.num_bytes)}{size}, {self.files:,}{files} files"


def read_quotas(text: str, gid: int, mount: Mount) -> list[Quota]:
    """A user's and one group's on one filesystem that limit something, as `lfs quota` and `quota` both print them."""
    found = []
    sections = list(_SECTION.finditer(text))
    bounds = [section.start() for section in sections] + [len(text)]
    for section, end in zip(sections, bounds[1:], strict=True):
        is_group = section["kind"].startswith("g")
        if is_group and int(section["id"]) != gid:
            continue
        # In brackets is what a server that does not answer had last.
        for row in _ROW.finditer(re.sub(r"[\[\]]", "", text[section.end() : end])):
            if row["place"] not in (mount.source, mount.point) and mount.kind != "lustre":
                continue
            quota = Quota(
                f"{'group' if is_group else 'user'} {section['name']}",
                1024 * int(row["kib"]),
                1024 * _least(row["soft_kib"], row["hard_kib"]),
                int(row["files"]),
                _least(row["soft_files"], row["hard_files"]),
            )
            if quota.most_bytes or quota.most_files:
                found.append(quota)
    return found


def _least(soft: str, hard: str) -> int:
    return min(filter(None, (int(soft), int(hard))), default=0)


def examine_quota(folder: Path, gid: int, mount: Mount, clock: Clock) -> Finding:
    """The quotas of group `gid` and of this user where `folder` is, as far as somebody can be asked."""
    if mount.kind == "lustre":
        program = "lfs"
        whose = (("-g", str(gid)), ("-u", str(os.geteuid())))
        commands = [["lfs", "quota", kind, number, str(folder)] for kind, number in whose]
    else:
        program = "quota"
        commands = [["quota", "-gQ"], ["quota", "-uQ"]]
    if not shutil.which(program):
        if mount.kind == "lustre":
            remedy = f"outside of a container, where lfs is: lfs quota -g {gid} {folder}"
            return Finding("quota", Verdict.WARN, "not asked: no lfs here", remedy)
        return Finding("quota", Verdict.PASS, "not asked: no lfs, no quota here")
    answers = [clock.run(command, _PROGRAM_S) for command in commands]
    quotas = [quota for answer in answers if answer for quota in read_quotas(answer.stdout, gid, mount)]
    text = "; ".join(map(str, quotas))
    if any(quota.is_nearly_used for quota in quotas):
        remedy = "a full one ends runs with 73 and keeps blocks out of the store: hpckv store gc, or ask for more"
        return Finding("quota", Verdict.WARN, text, remedy)
    if None in answers:
        silent = " ".join(commands[answers.index(None)])
        remedy = "ask again later, or your site's own command"
        return Finding("quota", Verdict.WARN, f"{silent} gives no answer", remedy)
    return Finding("quota", Verdict.PASS, text or f"{program} knows of no limit here")
