"""One rank of a launch: enters with `parallel.tp=N`, says on its own file how that ended, and ends like a command does.

N FOLDER
"""

import os
import sys
from pathlib import Path

from hpckv.comm import ParallelConfig, enter
from hpckv.errors import HpckvError


def main() -> None:
    number, folder = int(sys.argv[1]), Path(sys.argv[2])
    said = folder / f"rank-{os.environ.get('PMI_RANK', 'alone')}"
    try:
        world = enter(ParallelConfig(tp=number))
    except HpckvError as error:
        said.write_text(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)
    said.write_text(f"rank {world.group.rank} of {world.group.size} by {world.kind}, {len(world.members)} members")
    world.leave(0)


if __name__ == "__main__":
    main()
