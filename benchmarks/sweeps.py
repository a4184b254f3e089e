"""What a sweep adds to its runs, and what ASHA saves.

Overhead: the wall time of `batchcam sweep` over short trials, one at a time, less that of the same runs by `train()`
one after another in a process that has done one before, per trial. Ray's start and the first worker's imports count.

ASHA: the `lambda` space on digits, every trial to its end, and again with `--scheduler asha`: which share of the epochs
it takes, and whether the configuration it finds is as good as the grid's. The accuracy that a configuration was chosen
by cannot tell: the grid's is the highest of 55 chance results, ASHA's of the few that it let end. So both are trained
again on seeds that neither has seen, and their test accuracies are compared, seed by seed.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distributed_batchcam.trainer import train
from tune.space import read_space

from .timing import Bar, argument_parser, positive, report, several

TRIALS, OVERHEAD_SECONDS, EPOCHS_SHARE = 12, 3.0, 0.40
EPOCHS, WEIGHTS = 16, 9  # of the lambda space
FRESH_SEEDS = 8
STANDARD_ERRORS = 2.0  # by which two means have to differ to be told apart
SHORT = {"dataset": "digits", "image_size": 16, "batch_size": 64, "epochs": 2, "device": "cpu"}
GRID = {"dataset": "digits", "image_size": 16, "batch_size": 64, "valid_size": 400, "device": "cpu"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argument_parser(
        "sweeps", "What a sweep adds to its runs, and what ASHA saves.", rounds=3, fewest=1, warmup=0
    )
    parser.set_defaults(threads=1)
    parser.add_argument("--trials", type=positive, default=TRIALS, help="short trials to time (%(default)s)")
    parser.add_argument("--epochs", type=positive, default=EPOCHS, help="of each trial of the grid (%(default)s)")
    parser.add_argument(
        "--weights", type=positive, default=WEIGHTS, help="how many λ of the grid to take (%(default)s)"
    )
    parser.add_argument("--objectives", nargs="+", help="of the grid (all)")
    parser.add_argument(
        "--fresh-seeds",
        type=several,
        default=FRESH_SEEDS,
        metavar="N",
        help="to train both winners on again (%(default)s)",
    )
    parser.add_argument("--only", choices=["overhead", "asha"], help="one of the two")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        parser.error("--device cuda: sweeps are compared on the CPU")
    torch.set_num_threads(options.threads)

    bars: list[Bar] = []
    further: dict[str, Any] = {}
    if options.only != "asha":
        found = overhead(options.trials)
        further["overhead"] = found
        value = found["seconds_per_trial"] if options.trials == TRIALS else None
        bars.append(Bar(f"a sweep of {TRIALS} trials adds to each", "at most", OVERHEAD_SECONDS, value, " s"))
    if options.only != "overhead":
        grids = [asha(seed, options) for seed in range(options.rounds)]
        further["asha"] = grids
        whole = (options.epochs, options.weights, options.objectives) == (EPOCHS, WEIGHTS, None)
        share = max(grid["epochs_share"] for grid in grids)
        bars.append(
            Bar(
                "largest share of the grid's epochs that ASHA takes,", "at most", EPOCHS_SHARE, share if whole else None
            )
        )
        behind = max(grid["standard_errors_behind"] for grid in grids)
        bars.append(
            Bar(
                "trained again, ASHA's configuration is behind the grid's by",
                "at most",
                STANDARD_ERRORS,
                behind if whole and options.fresh_seeds == FRESH_SEEDS else None,
                " standard errors",
            )
        )
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


def asha(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The `lambda` space to its end and with ASHA: epochs, and the test accuracy of both winners on fresh seeds."""
    grid = read_space("lambda").grid
    axes = {"objective": options.objectives or grid["objective"], "weight": grid["weight"][: options.weights]}
    fixed = {**GRID, "epochs": options.epochs}
    fresh_seeds = [1000 * (seed + 1) + number for number in range(options.fresh_seeds)]
    with tempfile.TemporaryDirectory() as folder:
        space: dict[str, Any] = {"fixed": {**fixed, "seed": seed}, "grid": axes}
        records = {name: _sweep_record(Path(folder, name), space, name) for name in ("none", "asha")}
        winners = {name: record["leaderboard"][0] for name, record in records.items()}
        points = [_configuration(winner) for winner in winners.values()]
        space = {"fixed": fixed, "points": points[: 1 + (points[0] != points[1])], "grid": {"seed": fresh_seeds}}
        again = _sweep_record(Path(folder, "again"), space, "none")
    fresh: dict[str, list[float]] = {}
    for name, winner in winners.items():
        trials = [trial for trial in again["trials"] if _configuration(trial["axes"]) == _configuration(winner)]
        by_seed = {trial["axes"]["seed"]: trial["summary"]["test_accuracy"] for trial in trials}
        fresh[name] = [by_seed[number] for number in fresh_seeds]
    used = {name: sum(trial["epoch"] for trial in record["trials"]) for name, record in records.items()}
    found = {
        "seed": seed,
        "trials": len(records["none"]["trials"]),
        "epochs": used["none"],
        "asha_epochs": used["asha"],
        "epochs_share": used["asha"] / used["none"],
        "winner": points[0],
        "asha_winner": points[1],
        "best": winners["none"]["best_valid_accuracy_mean"],
        "asha_best": winners["asha"]["best_valid_accuracy_mean"],
        "fresh_seeds": fresh_seeds,
        "test_accuracies": fresh["none"],
        "asha_test_accuracies": fresh["asha"],
        "standard_errors_behind": standard_errors(fresh["none"], fresh["asha"]),
    }
    print(
        f"seed {seed}: grid {used['none']} epochs, {points[0]}, chosen with {found['best']:.2f} %; "
        f"ASHA {used['asha']} epochs ({found['epochs_share']:.0%}), {points[1]}, {found['asha_best']:.2f} %; "
        f"on {len(fresh_seeds)} further seeds {statistics.mean(fresh['none']):.2f} % "
        f"and {statistics.mean(fresh['asha']):.2f} %, {found['standard_errors_behind']:+.1f} standard errors behind"
    )
    return found


def standard_errors(ahead: Sequence[float], behind: Sequence[float]) -> float:
    """Mean of the differences of pairs ÷ its standard error; 0 where all pairs are alike."""
    differences = [first - second for first, second in zip(ahead, behind, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.mean(differences)
    return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0


def _configuration(axes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: axes[name] for name in ("objective", "weight") if axes.get(name) is not None}


def _sweep_record(storage: Path, space: Mapping[str, Any], scheduler: str) -> dict[str, Any]:
    file = storage.with_suffix(".yaml")
    file.write_text(json.dumps(space))
    sweep("--space", str(file), "--scheduler", scheduler, "--storage", str(storage))
    record: dict[str, Any] = json.loads((storage / "sweep.json").read_text())
    return record


def sweep(*arguments: str) -> None:
    """`batchcam sweep …` in a process of its own, on CPUs."""
    command = [sys.executable, "-m", "tune.sweep", "--gpus-per-worker", "0", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
