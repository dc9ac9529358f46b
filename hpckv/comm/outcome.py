"""What a rank tells the batch script, in files that the script made on the first node and names in the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


def note_exit_code(code: int) -> None:
    """The code this rank ends the others with, into `HPCKV_OUTCOME`: the launcher's own may be that of a rank it killed."""
    tell("HPCKV_OUTCOME", lambda: b"%d\n" % code)


def note_beginning(directory: Path, count_answers: Callable[[Path], int]) -> None:
    """How many answers are there, and the run directory, into `HPCKV_BEGINNING`: for a script that was not told the directory."""
    tell("HPCKV_BEGINNING", lambda: b"%d %s\n" % (count_answers(directory), os.fsencode(directory.absolute())))


def tell(name: str, line: Callable[[], bytes]) -> None:
    """A line into the file that the variable `name` says, if there is one on this node; trouble with it is nobody's."""
    if path := os.environ.get(name):
        with contextlib.suppress(OSError):  # the file is not on this node
            fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
            try:
                os.write(fd, line())
            finally:
                os.close(fd)
