"""Try every fault and write what came of it to docs/reliability.md.

python -m faults            # an hour or two
python -m faults --short    # a few of each
python -m faults --only kills --out kills.json    # in parts,
python -m faults --of kills.json …                # to be put together
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from signal import SIGKILL, SIGTERM

import torch

from . import costs, damage, disks, fuzz, kills, restarts, stops, trackers
from .runs import Figures

DOCUMENT = Path(__file__).parents[1] / "docs/reliability.md"


def experiments(short: bool, seed: int) -> dict[str, Callable[[Path], list[Figures]]]:
    """Each kind of fault by name; in short, those that need a minute or more for one trial are left to `tests/`."""
    times = 6  # of what takes long
    chosen: dict[str, Callable[[Path], list[Figures]]] = {
        "kills": lambda folder: [stops.at_random_moments(folder, SIGKILL, 3 if short else 50, seed)],
        "rank 0": lambda folder: [kills.one_of_two(folder, 0, 1 if short else 25, seed)],
        "rank 1": lambda folder: [kills.one_of_two(folder, 1, 1 if short else 25, seed)],
        "sizes": lambda folder: [kills.other_sizes(folder, 1 if short else 5, seed)],
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
    if not short:
        chosen |= {
            "trackers": lambda folder: trackers.of_wandb(folder, times, seed),
            "torchrun": lambda folder: [restarts.of_elastic_launcher(folder, "torchrun --max-restarts", times, seed)],
            "accelerate": lambda folder: [
                restarts.of_elastic_launcher(folder, "accelerate launch --max_restarts", times, seed)
            ],
            "requeue": lambda folder: [restarts.of_requeued_job(folder, times, seed)],
            "trials": lambda folder: [restarts.of_ray_trial(folder, times)],
            "costs": costs.of_checkpoints,
        }
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(experiments(False, 0)), help="some kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="for the bare figures, instead of the document")
    parser.add_argument("--of", nargs="+", type=Path, metavar="FILE.json", help="write the document of these figures")
    options = parser.parse_args()
    if options.of:
        parts = [json.loads(file.read_text()) for file in options.of]
        measured = [Figures(**figures) for part in parts for figures in part["figures"]]
        DOCUMENT.write_text(document(measured, sum(part["seconds"] for part in parts)))
        return
    chosen = {
        name: run for name, run in experiments(options.short, options.seed).items() if name in (options.only or [name])
    }
    found: list[Figures] = []
    since = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, experiment in chosen.items():
            before = os.times()
            figures = experiment(Path(folder))
            found += [replace(one, processors=_processors(before, os.times())) for one in figures]
            tried, survived = sum(f.tried for f in found), sum(f.survived for f in found)
            print(f"{name}, {time.monotonic() - since:.0f} s: {survived:,} of {tried:,} so far", flush=True)
    seconds = time.monotonic() - since
    if options.out is None:
        DOCUMENT.write_text(document(found, seconds))
    else:
        all_figures = {"seconds": seconds, "figures": [asdict(figures) for figures in found]}
        options.out.write_text(json.dumps(all_figures, indent=2))
    failures = [failure for figures in found for failure in figures.failures]
    print("\n".join(failures[:20]), file=sys.stderr)
    sys.exit(bool(failures))


def _processors(before: os.times_result, after: os.times_result) -> float:
    """How many processors this process and its children had in between, on average."""
    return (sum(after[:4]) - sum(before[:4])) / (after.elapsed - before.elapsed)


def document(found: list[Figures], seconds: float) -> str:
    """The figures as Markdown."""
    kinds = ("fault", "restart", "cost", "soak")
    return _TEXT.format(
        **{kind: _table([figures for figures in found if figures.kind == kind]) for kind in kinds},
        minutes=round(seconds / 60),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    )


def _table(found: list[Figures]) -> str:
    titles = ["what happened", "tried", "survived", "seconds, median", "processors", ""]
    rows = [
        [
            figures.fault,
            f"{figures.tried:,}",
            f"{figures.survived:,}",
            _seconds(figures),
            "" if figures.processors is None else f"{figures.processors:.2f}",
            figures.note,
        ]
        for figures in found
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows])


def _seconds(figures: Figures) -> str:
    return ", ".join(
        f"{what}: {statistics.median(values):.3g} (at most {max(values):.3g})"
        for what, values in figures.seconds.items()
    )


_TEXT = """# Reliability

Written by `make faults` and `make soak`; not to be edited. {machine}; {minutes} minutes. No GPU was there.

A run is `simple_cnn` on digits of 16×16 pixels, two epochs of 20 steps, with a checkpoint every 7 steps, on the CPU.
"Processors" is how many of them the experiment had on average: about 1 for runs of one process where the machine is
idle, up to 2 for two. Where it is far below, other work went on, and the seconds are longer than they would have been
(but for experiments that wait for a `--timeout` by their nature). Where it is not given, the machine was busy.

## Faults

"Survived" means: the run went on with `--resume auto` and ended with the weights of the undisturbed run bit for bit and
with the same `metrics.jsonl` but for times and rates (on another number of processes: with the same losses within 2 %);
a full or read-only folder or a signal was one line; damage was named and never loaded; strange input was read or
refused in one line; trouble with W&B changed nothing.

{fault}

## Restarted launches

A run of 8 epochs, met in its middle and started again by somebody else. "Survived" means that nobody had to do anything
and that it ended as the undisturbed one did, bit for bit: how far each of these can be trusted. The time is from the
fault, or from the second start of a job, until the run is further than it was: the launcher's own patience, the start
of Python, and the steps since the last checkpoint. All need `--resume auto` and the same `--out`. This project does not
use the worker groups of Ray Train: a trial starts its own processes (`tune/ranks.py`), and is itself started again.
Elastic launchers give all restarts one store, with the addresses of those before in it. On one machine each restart
keeps its keys apart (`runtime.py`; without that nearly half of these ended for good); on several, not tried here, the
launcher has to be told: `--rdzv-backend c10d` and `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`.

{restart}

## What a checkpoint costs

{cost}

## Soak

Short runs in one process, one after the other, and launches one after the other; medians of five at both ends.

{soak}
"""


if __name__ == "__main__":
    main()
