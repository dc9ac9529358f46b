"""Every error raised on purpose, and the exit code each ends a command with.

The codes are those of `sysexits.h` where one fits. A cache miss, a full tier and a preempted request
are results, not errors.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED_REQUESTS = 3
EXIT_DRAINED = 75


class HpckvError(Exception):
    """Base of all errors that end a command with one clear line; `exit_code` is the process's status."""

    exit_code = 70


class ConfigError(HpckvError, ValueError):
    """A wrong flag, run file key or argument: nothing was started."""

    exit_code = 64


class InputError(HpckvError, ValueError):
    """A bad line in the input file."""

    exit_code = 65


class MissingInputError(HpckvError):
    """A file the user named is not there."""

    exit_code = 66


class ModelError(HpckvError):
    """The model folder is missing, incomplete, damaged, or of an architecture that is not known."""

    exit_code = 69


class StoreError(HpckvError):
    """The block store cannot be opened. During a run a failing store is a miss, never this."""

    exit_code = 69


class SlurmError(HpckvError):
    """Slurm cannot be asked, or does not answer."""

    exit_code = 69


class CannotWriteError(HpckvError):
    """The output cannot be written: read-only, full, or in use by another run."""

    exit_code = 73


class AccessError(HpckvError):
    """Permission or quota."""

    exit_code = 77


class CapabilityError(HpckvError):
    """The configuration does not fit this machine or this version."""

    exit_code = 78


class CapacityError(HpckvError):
    """One request can never fit: longer than the context or than all pages together."""

    exit_code = EXIT_FAILED_REQUESTS
