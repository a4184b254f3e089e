"""`batchcam` and `python -m distributed_batchcam`."""

import os
import sys
from typing import NoReturn

from .cli import run


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    status = run(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # gloo's threads may outlive the interpreter and abort a process whose work is done: leave at once.
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
