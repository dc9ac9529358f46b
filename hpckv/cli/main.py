"""`hpckv`: the entry point, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import errno
import os
import sys

from hpckv.workload.drain import block_signals


def main() -> None:
    """Run a command, end with its exit code. An error the project knows is never a traceback."""
    block_signals()  # before the imports below: numpy starts threads

    from hpckv.cli.app import app
    from hpckv.errors import CannotWriteError, ConfigError, HpckvError

    try:
        app()
    except HpckvError as error:
        sys.stderr.write("hpckv: " + " ".join(str(error).splitlines()) + "\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        sys.stderr.write(f"hpckv: standard output cannot be written: {error.strerror}\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again at its end
        sys.exit(CannotWriteError.exit_code)
    except SystemExit as end:
        # typer ends with 2 for a wrong flag; no command of ours does.
        sys.exit(ConfigError.exit_code if end.code == 2 else end.code)


if __name__ == "__main__":
    main()
