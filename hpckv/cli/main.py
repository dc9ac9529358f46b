"""`hpckv`: the entry point, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

from hpckv.workload.drain import block_signals

if TYPE_CHECKING:
    from typer import TyperException


def main() -> None:
    """Run a command, end with its exit code. An error the project knows is never a traceback."""
    block_signals()  # before the imports below: numpy starts threads

    from typer import TyperException

    from hpckv.cli.app import app
    from hpckv.errors import AccessError, CannotWriteError, ConfigError, HpckvError

    try:
        sys.exit(app(standalone_mode=False))
    except HpckvError as error:
        sys.exit(_say(str(error), error.exit_code))
    except TyperException as error:
        sys.exit(_say_usage(error, ConfigError.exit_code))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except PermissionError as error:
        if error.filename is None:
            raise
        sys.exit(_say(f"{error.filename}: permission denied", AccessError.exit_code))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        if error.filename is not None:
            sys.exit(_say(f"{error.filename}: {error.strerror}", CannotWriteError.exit_code))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again at its end
        sys.exit(_say(f"standard output cannot be written: {error.strerror}", CannotWriteError.exit_code))


def _say(text: str, exit_code: int) -> int:
    sys.stderr.write("hpckv: " + " ".join(text.splitlines()) + "\n")
    return exit_code


def _say_usage(error: TyperException, exit_code: int) -> int:
    """What is wrong with the command line, and where to look; the whole help where nothing was given."""
    text, context = error.format_message(), getattr(error, "ctx", None)
    if text.startswith("Usage:"):
        sys.stderr.write(text + "\n")
        return exit_code
    line = " ".join(map(str.strip, text.splitlines())).rstrip(".")  # possible values stand below each other
    return _say(line + (f"; see {context.command_path} --help" if context else ""), exit_code)


if __name__ == "__main__":
    main()
