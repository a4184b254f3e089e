"""Seconds from launch to the paper's best test accuracy: `batchcam train` as a user starts it, its metrics watched.

The clock starts before the process does: importing torch, reading the images, prototypes, and the evaluation after
each epoch are all in it. An accuracy counts from the moment that its line stands in the file. The runs validate on
the test set (`--valid-size 0`, as the paper does) by a recipe that stands here; each round has a seed of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_batchcam.runtime import emulates_bf16

from .timing import Bar, Spread, Table, argument_parser, choose_device, report

MODEL = "simple_cnn"
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Goal:
    """A test accuracy in percent, the paper's best with this model, and the options that get there."""

    accuracy: float
    recipe: tuple[str, ...]


GOALS = {
    "mnist": Goal(99.0, ("--epochs", "1", "--batch-size", "64", "--lr", "6e-3", "--label-smoothing", "0.05")),
    "fashion_mnist": Goal(91.3, ("--epochs", "3", "--lr", "4e-3", "--weight", "0.01")),
    "digits": Goal(97.0, ("--epochs", "10", "--lr", "3e-3")),  # not of the paper, but without any file
}
BAR_DATASETS = ("mnist", "fashion_mnist")


@dataclass(frozen=True)
class Outcome:
    """Of one run."""

    seconds: float  # from launch to the goal; to the end of the run where it was not reached
    reached: bool
    last_accuracy: float  # percent, after the last epoch


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argument_parser(
        "time_to_accuracy",
        "Seconds from launch to the paper's best test accuracy. Options that it does not know go to batchcam train.",
        rounds=3,
        warmup=0,
    )
    parser.add_argument("--datasets", nargs="+", default=list(BAR_DATASETS), choices=GOALS, help="%(default)s")
    parser.add_argument("--objectives", nargs="+", default=["baseline", "bcpl_l1"], help="baseline bcpl_l1")
    parser.add_argument("--accuracy", type=float, help="percent, instead of the paper's best")
    options, further = parser.parse_known_args(arguments)
    device = choose_device(parser, options.device)
    common = ("--precision", "no" if emulates_bf16(device) else "bf16", "--channels-last")

    tables, bars, accuracies = [], [], {}
    for dataset in options.datasets:
        goal = GOALS[dataset]
        accuracy = goal.accuracy if options.accuracy is None else options.accuracy
        found: dict[str, list[Outcome]] = {objective: [] for objective in options.objectives}
        for seed in range(options.rounds):
            for objective in options.objectives:
                command = [
                    *("--dataset", dataset, "--model", MODEL, "--objective", objective, "--seed", str(seed)),
                    *("--valid-size", "0", "--device", device.type, *common, *goal.recipe, *further),
                ]
                found[objective].append(run(command, accuracy, options.threads))
        seconds = {objective: [outcome.seconds for outcome in outcomes] for objective, outcomes in found.items()}
        tables.append(Table.of(f"launch to {accuracy:g} % on the test set, {dataset}, {MODEL}, {device.type}", seconds))
        accuracies[dataset] = {
            objective: Spread.of([outcome.last_accuracy for outcome in outcomes])._asdict()
            for objective, outcomes in found.items()
        }
        as_the_bar_says = dataset in BAR_DATASETS and options.accuracy is None and not further
        bars += [
            Bar(
                f"share of {len(outcomes)} runs that reach {accuracy:g} %, {dataset}, {objective},",
                "at least",
                1,
                sum(outcome.reached for outcome in outcomes) / len(outcomes) if as_the_bar_says else None,
                unit="",
            )
            for objective, outcomes in found.items()
        ]
    recipes = {dataset: [*common, *GOALS[dataset].recipe, *further] for dataset in options.datasets}
    report(
        "time_to_accuracy",
        options,
        device,
        tables,
        bars,
        further={"last_accuracy": accuracies, "recipe": recipes},
    )


def run(options: Sequence[str], accuracy: float, threads: int) -> Outcome:
    """Start `batchcam train` with these options, and watch it reach an accuracy (percent) on its validation set.

    Raises:
        SystemExit: the run failed; its last line says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "run"), Path(folder, "log")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        start = time.perf_counter()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "distributed_batchcam", "train", *options, "--out", str(out)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            try:
                seconds, reached, last = None, False, 0.0
                for line in validations(out / "metrics.jsonl", process):
                    last = line["accuracy"]
                    if last >= accuracy and seconds is None:
                        seconds, reached = time.perf_counter() - start, True
            finally:
                process.kill()
                process.wait()
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise SystemExit(f"error: batchcam train {' '.join(options)}: {lines[-1] if lines else 'no output'}")
    return Outcome(seconds or time.perf_counter() - start, reached, last)


def validations(file: Path, process: "subprocess.Popen[bytes]") -> Iterator[Mapping[str, Any]]:
    """The lines about the validation set, each as soon as it is there, until the process ends."""
    read, over = 0, False
    while not over:
        over = process.poll() is not None
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        for text in lines[read:]:
            line = json.loads(text)
            if line["split"] == "valid":
                yield line
        read = len(lines)
        if not over:
            time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
