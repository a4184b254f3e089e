"""Try every fault and write what came of it to docs/reliability.md.

python -m faults            # about an hour
python -m faults --short    # a few of each
python -m faults --only kills --out kills.json    # in parts,
python -m faults --of kills.json …                # to be put together
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from signal import SIGKILL, SIGTERM

import torch

from . import costs, damage, disks, fuzz, kills, stops
from .runs import Figures

DOCUMENT = Path(__file__).parents[1] / "docs/reliability.md"


def experiments(short: bool, seed: int) -> dict[str, Callable[[Path], list[Figures]]]:
    """Each kind of fault by name."""
    return {
        "kills": lambda folder: [stops.at_random_moments(folder, SIGKILL, 3 if short else 50, seed)],
        "pairs": lambda folder: [kills.one_of_two(folder, 1 if short else 50, seed)],
        "writes": lambda folder: [kills.inside_writes(folder, 3 if short else None)],
        "space": lambda folder: [kills.full_disk(folder, 3 if short else None)],
        "damage": lambda folder: [damage.each_region(folder, 40 if short else 70)],
        "disks": lambda folder: [disks.small_file_systems(folder, 1 if short else 12)],
        "read-only": lambda folder: [disks.read_only(folder, 1 if short else 12)],
        "stops": lambda folder: [stops.at_random_moments(folder, SIGTERM, 2 if short else 20, seed)],
        "one of two": lambda folder: [stops.of_one_of_two(folder, 1 if short else 10, seed)],
        "hangs": lambda folder: [stops.of_one_rank(folder, 4, (1,) if short else (0, 1) * 3)],
        "fuzz": lambda folder: fuzz.everything(folder, 60 if short else 1500),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(experiments(True, 0)), help="some kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="for the bare figures, instead of the document")
    parser.add_argument("--of", nargs="+", type=Path, metavar="FILE.json", help="write the document of these figures")
    options = parser.parse_args()
    if options.of:
        parts = [json.loads(file.read_text()) for file in options.of]
        write([Figures(**figures) for part in parts for figures in part["figures"]], sum(p["seconds"] for p in parts))
        return
    chosen = {
        name: run for name, run in experiments(options.short, options.seed).items() if name in (options.only or [name])
    }
    found: list[Figures] = []
    since = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, experiment in chosen.items():
            found += experiment(Path(folder))
            tried, survived = sum(f.tried for f in found), sum(f.survived for f in found)
            print(f"{name}, {time.monotonic() - since:.0f} s: {survived:,} of {tried:,} so far", flush=True)
    seconds = time.monotonic() - since
    if options.out is None:
        write(found, seconds)
    else:
        all_figures = {"seconds": seconds, "figures": [asdict(figures) for figures in found]}
        options.out.write_text(json.dumps(all_figures, indent=2))
    failures = [failure for figures in found for failure in figures.failures]
    print("\n".join(failures[:20]), file=sys.stderr)
    sys.exit(bool(failures))


def write(found: list[Figures], seconds: float) -> None:
    """Measure what checkpoints cost, and write the document."""
    with tempfile.TemporaryDirectory() as folder:
        DOCUMENT.write_text(document(found, costs.of_checkpoints(Path(folder)), seconds))


def document(found: list[Figures], cost: str, seconds: float) -> str:
    """The figures as Markdown."""
    rows = [
        f"| {figures.fault} | {figures.tried:,} | {figures.survived:,} | {_seconds(figures)} | {figures.note} |"
        for figures in found
    ]
    return _TEXT.format(
        rows="\n".join(rows),
        cost=cost,
        minutes=round(seconds / 60),
        machine=f"{platform.system()} {platform.machine()}, torch {torch.__version__}",
    )


def _seconds(figures: Figures) -> str:
    return ", ".join(
        f"{what}: {statistics.median(values):.1f} (at most {max(values):.1f})"
        for what, values in figures.seconds.items()
    )


_TEXT = """# Reliability

Written by `make faults`; not to be edited. {machine}; {minutes} minutes.

"Survived" means: the run went on with `--resume auto` and ended with the weights of the undisturbed run bit for bit and
with the same `metrics.jsonl` but for times and rates; a full disk or a signal was one line; damage was named and never
loaded; strange input was read or refused in one line. A run is `simple_cnn` on digits of 16×16 pixels, two epochs of 20
steps, with a checkpoint every 7 steps, on the CPU. No GPU was there.

| fault | tried | survived | seconds, median | |
|---|---|---|---|---|
{rows}

{cost}
"""


if __name__ == "__main__":
    main()
