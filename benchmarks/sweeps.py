"""What a sweep adds to its runs, and what ASHA saves.

Overhead: the wall time of `batchcam sweep` over short trials, one at a time, less that of the same runs by `train()`
one after another in a process that has done one before, per trial. Ray's start and the first worker's imports count.

ASHA: the `lambda` space on digits, every trial to its end, and again with `--scheduler asha`: which share of the epochs
it takes, and how far its best validation accuracy stays behind that of the whole grid.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distributed_batchcam.trainer import train
from tune.space import read_space

from .timing import Bar, argument_parser, positive, report

TRIALS, OVERHEAD_SECONDS, EPOCHS_SHARE = 12, 3.0, 0.40
EPOCHS, WEIGHTS = 16, 9  # of the lambda space
SHORT = {"dataset": "digits", "image_size": 16, "batch_size": 64, "epochs": 2, "device": "cpu"}
GRID = {"dataset": "digits", "image_size": 16, "batch_size": 64, "valid_size": 400, "device": "cpu"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argument_parser("sweeps", "What a sweep adds to its runs, and what ASHA saves.", rounds=3)
    parser.set_defaults(threads=1)
    parser.add_argument("--trials", type=positive, default=TRIALS, help="short trials to time (%(default)s)")
    parser.add_argument("--epochs", type=positive, default=EPOCHS, help="of each trial of the grid (%(default)s)")
    parser.add_argument(
        "--weights", type=positive, default=WEIGHTS, help="how many λ of the grid to take (%(default)s)"
    )
    parser.add_argument("--objectives", nargs="+", help="of the grid (all)")
    parser.add_argument("--only", choices=["overhead", "asha"], help="one of the two")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    bars: list[Bar] = []
    further: dict[str, Any] = {}
    if options.only != "asha":
        found = overhead(options.trials)
        further["overhead"] = found
        value = found["seconds_per_trial"] if options.trials == TRIALS else None
        bars.append(Bar(f"a sweep of {TRIALS} trials adds to each", "at most", OVERHEAD_SECONDS, value, " s"))
    if options.only != "overhead":
        grids = [asha(seed, options.epochs, options.weights, options.objectives) for seed in range(options.rounds)]
        further["asha"] = grids
        whole = (options.epochs, options.weights, options.objectives) == (EPOCHS, WEIGHTS, None)
        share = max(grid["epochs_share"] for grid in grids)
        bars.append(
            Bar(
                "largest share of the grid's epochs that ASHA takes,", "at most", EPOCHS_SHARE, share if whole else None
            )
        )
        behind = max(grid["best"] - grid["asha_best"] for grid in grids)
        bars.append(Bar("ASHA's best is behind the grid's by", "at most", 0.0, behind if whole else None, " points"))
    report("sweeps", options, torch.device("cpu"), [], bars, packages=["ray"], further=further)


def overhead(trials: int) -> dict[str, Any]:
    """Seconds that a sweep adds to each of its trials."""
    with tempfile.TemporaryDirectory() as folder:
        space = Path(folder, "space.yaml")
        space.write_text(json.dumps({"fixed": SHORT, "grid": {"seed": list(range(trials))}}))
        runs = read_space(str(space)).trials()
        train(runs[0].config(out=Path(folder, "warm-up")))
        start = time.perf_counter()
        for run in runs:
            train(run.config(out=Path(folder, run.id)))
        alone = time.perf_counter() - start
        start = time.perf_counter()
        sweep("--space", str(space), "--max-concurrent", "1", "--storage", f"{folder}/sweep")
        whole = time.perf_counter() - start
    print(
        f"{trials} runs: {alone:.1f} s by train(), {whole:.1f} s as a sweep: {(whole - alone) / trials:.2f} s a trial"
    )
    return {
        "trials": trials,
        "train_seconds": alone,
        "sweep_seconds": whole,
        "seconds_per_trial": (whole - alone) / trials,
    }


def asha(seed: int, epochs: int, weights: int, objectives: Sequence[str] | None) -> dict[str, Any]:
    """The `lambda` space to its end and with ASHA: epochs, and the best validation accuracy."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        space = Path(folder, "space.yaml")
        grid = read_space("lambda").grid
        axes = {"objective": objectives or grid["objective"], "weight": grid["weight"][:weights]}
        space.write_text(json.dumps({"fixed": {**GRID, "epochs": epochs, "seed": seed}, "grid": axes}))
        for scheduler in ("none", "asha"):
            storage = Path(folder, scheduler)
            sweep("--space", str(space), "--scheduler", scheduler, "--storage", str(storage))
            found[scheduler] = json.loads((storage / "sweep.json").read_text())
    used = {name: sum(trial["epoch"] for trial in record["trials"]) for name, record in found.items()}
    best = {name: record["leaderboard"][0]["best_valid_accuracy_mean"] for name, record in found.items()}
    accuracies = [entry["best_valid_accuracy_mean"] for entry in found["none"]["leaderboard"]]
    share = used["asha"] / used["none"]
    print(
        f"seed {seed}: {used['none']} epochs, best {best['none']:.2f} %, median {statistics.median(accuracies):.2f} %; "
        f"ASHA {used['asha']} epochs ({share:.0%}), best {best['asha']:.2f} %"
    )
    return {
        "seed": seed,
        "trials": len(found["none"]["trials"]),
        "epochs": used["none"],
        "asha_epochs": used["asha"],
        "epochs_share": share,
        "best": best["none"],
        "asha_best": best["asha"],
    }


def sweep(*arguments: str) -> None:
    """`batchcam sweep …` in a process of its own, on CPUs."""
    command = [sys.executable, "-m", "tune.sweep", "--gpus-per-worker", "0", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
