"""Settings of the block store (`store:`)."""

from __future__ import annotations

from typing import Literal

from hpckv.errors import ConfigError
from hpckv.quantity import ByteSize
from hpckv.schema import Config


class StoreConfig(Config, frozen=True):
    """Where prefixes are kept between runs. Without this section nothing is, and everything else works."""

    shared: str
    """Folder of the store; on a cluster, a project's folder on Lustre or NFS. Made on first use."""
    local: str = "auto"
    """Node-local folder for read-through copies; `none`; or `auto`: where the store lies on a network filesystem, the node's
    own disk ($HPCKV_LOCAL, $SLURM_TMPDIR, $TMPDIR, /local/$USER/$SLURM_JOB_ID, /tmp)."""
    local_size: ByteSize = ByteSize(200 * 1024**3)
    """Budget of the node-local copies."""
    host_size: ByteSize = ByteSize(1024**3)
    """Budget of the host RAM tier; 0 turns it off."""
    read: bool = True
    """Look prefixes up in the store."""
    write: Literal["all", "planned", "off"] = "planned"
    """Which computed blocks are kept: every full one, those that the plan or a second use says will be wanted again, none."""
    segment_size: ByteSize = ByteSize(128 * 1024**2)
    """A segment is sealed when it holds so many bytes of blocks (or at the end, or after `seal_s`)."""
    seal_s: float = 60.0
    """Longest time a computed block waits in an open segment, seconds."""
    deadline_s: float = 10.0
    """Longest time a request waits for stored blocks before they are computed instead, and the start and the end of a run for
    a store that does not answer, seconds."""

    def __post_init__(self) -> None:
        if not self.seal_s > 0:
            raise ConfigError(f"store.seal_s: {self.seal_s} is not above 0")
        if not self.deadline_s > 0:
            raise ConfigError(f"store.deadline_s: {self.deadline_s} is not above 0")
        if self.segment_size < 1:
            raise ConfigError(f"store.segment_size: {self.segment_size} is not above 0")
