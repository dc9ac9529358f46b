"""What a rank that ends the others tells the batch script: the launcher's own exit code may be that of a rank it killed."""

from __future__ import annotations

import contextlib
import os


def note_exit_code(code: int) -> None:
    """Write the code this rank ends with into the file that `HPCKV_OUTCOME` names, if it is on this node."""
    if path := os.environ.get("HPCKV_OUTCOME"):
        with contextlib.suppress(OSError):  # the script made it on the first node only
            fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
            try:
                os.write(fd, b"%d\n" % code)
            finally:
                os.close(fd)
