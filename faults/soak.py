"""Hours of short runs in one process, and many launches: memory, file descriptors and threads stay flat.

python -m faults.soak --minutes 120 --launches 200
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path

from distributed_batchcam.cli import run

from .runs import OPTIONS, Figures

WARM_UP = 5  # runs until caches are filled
ENDS = 5  # runs at the start and at the end that are compared, by their medians
GROWTH = {"MiB of memory": 64, "open files": 0, "threads": 0}
"""More than this from the start to the end is a leak."""


def runs_in_one_process(folder: Path, minutes: float) -> Figures:
    """Back-to-back runs; memory, open files and threads of the process after each."""
    figures = Figures(f"runs in one process, back to back for {minutes:g} minutes", "soak")
    found: dict[str, list[int]] = {what: [] for what in GROWTH}
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline or figures.tried < WARM_UP + 2 * ENDS:
        out = folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        since = time.monotonic()
        with redirect_stdout(StringIO()):
            status = run([*OPTIONS, "--epochs", "1", "--out", str(out)])
        figures.took("a run", time.monotonic() - since)
        figures.count(f"run {figures.tried}: status {status}" if status else None)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["MiB of memory"].append(pages * os.sysconf("SC_PAGESIZE") >> 20)
        found["open files"].append(len(os.listdir("/proc/self/fd")))
        found["threads"].append(len(os.listdir("/proc/self/task")))
    _flat(figures, {what: values[WARM_UP:] for what, values in found.items()})
    return figures


def launches(folder: Path, count: int) -> Figures:
    """Runs in processes of their own: each ends well and leaves no process behind."""
    figures, memory = Figures("launches one after another", "soak"), []
    for number in range(count):
        out = folder / f"launch-{number}"
        command = [sys.executable, "-m", "distributed_batchcam", *OPTIONS, "--epochs", "1", "--out", str(out)]
        since = time.monotonic()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        figures.took("a launch", time.monotonic() - since)
        failure = f"launch {number}: status {process.returncode}" if process.returncode else None
        figures.count(failure or (f"launch {number} left a process behind" if _group_lives(process.pid) else None))
        memory.append(used.ru_maxrss >> 10)
        shutil.rmtree(out, ignore_errors=True)
    _flat(figures, {"MiB of memory": memory})
    return figures


def _flat(figures: Figures, found: dict[str, list[int]]) -> None:
    """Note where each figure began, its highest value and where it ended; one that grew is a failure."""
    notes = []
    for what, values in found.items():
        first, last = (round(statistics.median(ends)) for ends in (values[:ENDS], values[-ENDS:]))
        notes.append(f"{what}: {first:,} at the start, {last:,} at the end, at most {max(values):,}")
        if last - first > GROWTH[what]:
            figures.failures.append(f"{figures.fault}: {notes[-1]}")
    figures.note = "; ".join(notes)


def _group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120, help="of runs in one process; 0: none")
    parser.add_argument("--launches", type=int, default=200, help="0: none")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="for the figures, as faults --of reads them")
    options = parser.parse_args()
    found, since = [], time.monotonic()
    # By this name whoever shares the machine finds the launches too.
    with tempfile.TemporaryDirectory(prefix="faults.soak-") as folder:
        if options.launches:
            found.append(launches(Path(folder), options.launches))
        if options.minutes:
            found.append(runs_in_one_process(Path(folder), options.minutes))
    report = json.dumps({"seconds": time.monotonic() - since, "figures": [asdict(figures) for figures in found]})
    if options.out is not None:
        options.out.write_text(report)
    for figures in found:
        print(f"{figures.fault}: {figures.survived} of {figures.tried} ended well; {figures.note}")
    failures = [failure for figures in found for failure in figures.failures]
    print("\n".join(failures[:20]), file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
