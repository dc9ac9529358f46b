"""Settings of the block store (`store:`)."""

from __future__ import annotations

from typing import Literal

from hpckv.errors import ConfigError
from hpckv.quantity import ByteSize, parse_duration
from hpckv.schema import Config
from hpckv.store.policy import Bridging

PINNED_S = 2**32 - 1
"""Seconds that stand for ever."""
_CLASSES = {"default": 0, "pinned": PINNED_S}


class StoreConfig(Config, frozen=True):
    """Where prefixes are kept between runs. Without this section nothing is, and everything else works."""

    shared: str
    """Folder of the store; on a cluster, a project's folder on Lustre or NFS. Made on first use."""
    local: str = "auto"
    """Node-local folder for read-through copies; `none`; or `auto`: where the store lies on a network filesystem, the node's
    own disk ($HPCKV_LOCAL, $SLURM_TMPDIR, the site file's folder, $TMPDIR, /local/$USER/$SLURM_JOB_ID, /tmp). A folder in a
    site file is that one, and does not replace `auto`."""
    site_local: str | None = None
    """The site file's folder: its `local`, put here as the run file is read."""
    local_size: ByteSize = ByteSize(200 * 1024**3)
    """Most bytes of node-local copies on a node; never more than `slurm.tmp` asks for, and a twentieth of the disk stays free."""
    host_size: ByteSize = ByteSize(1024**3)
    """Budget of the host RAM tier; 0 turns it off. Buffers for reading and writing take up to 1 GiB beside it (128 blocks at
    most)."""
    read: bool = True
    """Look prefixes up in the store."""
    write: Literal["all", "planned", "off"] = "planned"
    """Which computed blocks are kept: every full one, those that the plan or a second use says will be wanted again, none."""
    bridging: Bridging = "exact"
    """Use blocks that the same model left in another dtype, converted: `off`; `exact`, where every value stays what it is
    (bfloat16 to float16 and float32, float16 to float32); `any`, also where values are rounded. The store may allow less.
    What was bridged is counted apart and declared in provenance.json."""
    segment_size: ByteSize = ByteSize(256 * 1024**2)
    """A segment is sealed when it holds so many bytes of blocks (or at the end, or after `seal_s`)."""
    seal_s: float = 60.0
    """Longest time a computed block waits in an open segment, seconds."""
    keep: str = "default"
    """How long what this run stores is kept after its last use: a duration such as `5min`, `1h`, `7d`, after which it is
    deleted; `pinned`, until it is purged; `default`, as the store's keep_days and quota say."""
    private: bool = False
    """Keep this run's blocks to yourself: their folder is yours alone (0700), their keys are salted with a secret of yours,
    and nobody else's blocks are read."""
    read_rate: ByteSize | None = None
    """Most bytes a second that this process reads from the shared store, where a site asks for it; what would wait for longer
    than a second is computed instead."""
    write_rate: ByteSize | None = None
    """Most bytes a second that this process writes to the shared store; what it cannot keep up with is dropped."""
    audit: float = 0.001
    """Share of the requests that compute their whole prefix themselves, to compare what other users stored of it. A writer
    whose blocks do not agree is not read any more. Only in a store that a group shares."""
    deadline_s: float = 10.0
    """Longest time a request waits for stored blocks before they are computed instead, and each step of the start and the end of
    a run for a store that does not answer, seconds."""

    def __post_init__(self) -> None:
        if not self.seal_s > 0:
            raise ConfigError(f"store.seal_s: {self.seal_s} is not above 0")
        self.keep_s  # noqa: B018 - refuses what is no duration
        for name in ("read_rate", "write_rate"):
            if getattr(self, name) == 0:
                raise ConfigError(f"store.{name}: 0 is not above 0; to turn it off, write store.read or store.write")
        if not 0 <= self.audit <= 1:
            raise ConfigError(f"store.audit: {self.audit} is not between 0 and 1")
        if not self.deadline_s > 0:
            raise ConfigError(f"store.deadline_s: {self.deadline_s} is not above 0")
        if self.segment_size < 1:
            raise ConfigError(f"store.segment_size: {self.segment_size} is not above 0")

    @property
    def keep_s(self) -> int:
        """`keep` as segments carry it; raises `ConfigError`."""
        if self.keep in _CLASSES:
            return _CLASSES[self.keep]
        seconds = int(parse_duration(self.keep))
        if not 0 < seconds < PINNED_S:
            raise ConfigError(f"store.keep: {self.keep} is not above 0")
        return seconds
