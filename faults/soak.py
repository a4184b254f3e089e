"""Hours of short runs in one process, and many launches: memory, file descriptors and threads stay flat.

python -m faults.soak --minutes 120 --launches 200
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from distributed_batchcam.cli import run

from .runs import OPTIONS

WARM_UP = 5  # runs until caches are filled
GROWTH_MB = 64
"""More than this from after the warm-up to the end is a leak."""


def runs_in_one_process(folder: Path, minutes: float) -> dict[str, list[int]]:
    """Back-to-back runs: resident MiB, open files and threads after each."""
    found: dict[str, list[int]] = {"memory in MiB": [], "open files": [], "threads": []}
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline or len(found["threads"]) <= WARM_UP:
        out = folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        with redirect_stdout(StringIO()):
            assert run([*OPTIONS, "--epochs", "1", "--out", str(out)]) == 0
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["memory in MiB"].append(pages * os.sysconf("SC_PAGESIZE") >> 20)
        found["open files"].append(len(os.listdir("/proc/self/fd")))
        found["threads"].append(threading.active_count())
    return found


def launches(folder: Path, count: int) -> int:
    """Runs in processes of their own; how many ended well and left no process behind."""
    well = 0
    for number in range(count):
        command = [sys.executable, "-m", "distributed_batchcam", *OPTIONS, "--epochs", "1"]
        finished = subprocess.run([*command, "--out", str(folder / f"launch-{number}")], capture_output=True)
        well += finished.returncode == 0
        shutil.rmtree(folder / f"launch-{number}", ignore_errors=True)
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--launches", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = runs_in_one_process(Path(folder), options.minutes)
        well = launches(Path(folder), options.launches)
    flat = {
        name: values[-1] - values[WARM_UP] <= (GROWTH_MB if "memory" in name else 0) for name, values in found.items()
    }
    report = {
        "minutes": options.minutes,
        "runs in one process": len(found["threads"]),
        **{name: {"after warm-up": values[WARM_UP], "at the end": values[-1]} for name, values in found.items()},
        "launches": options.launches,
        "launches that ended well": well,
        "flat": all(flat.values()),
    }
    print(json.dumps(report, indent=2))
    sys.exit(not (report["flat"] and well == options.launches))


if __name__ == "__main__":
    main()
