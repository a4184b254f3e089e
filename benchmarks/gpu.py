"""All benchmarks with a GPU's settings: `make bench-gpu`. Where no GPU is, a smoke run of each on the CPU.

A smoke run does everything at a tiny size. Its times mean nothing, so every bar then says "not measured".
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from . import (
    against_predecessor,
    cam_libraries,
    collective_traffic,
    epoch_time,
    fraction_of_peak,
    memory,
    step_time,
    time_to_accuracy,
)

ROUNDS = ("--rounds", "2", "--threads", "1")
BOTH = ("no", "yes")
STEPS = ("--rounds", "100", "--warmup", "20", "--precisions", "no", "bf16")
EPOCHS = ("--rounds", "5", "--workers", "8")


class Benchmark(NamedTuple):
    """A benchmark's command line, and its options on a GPU and for a smoke run, where a CPU can run it at all."""

    main: Callable[[Sequence[str]], None]
    gpu: tuple[str, ...]
    smoke: tuple[str, ...] | None


BENCHMARKS = {
    "step_time": Benchmark(
        step_time.main,
        (*STEPS, "--compile", *BOTH, "--channels-last", *BOTH),
        (
            "--warmup",
            "1",
            "--models",
            "simple_cnn",
            "--objectives",
            "bcpl_l1",
            "--batch-size",
            "8",
            "--precisions",
            "bf16",
        ),
    ),
    "against_predecessor": Benchmark(
        against_predecessor.main, ("--rounds", "20"), ("--warmup", "1", "--batch-size", "4")
    ),
    "cam_libraries": Benchmark(
        cam_libraries.main,
        ("--rounds", "100", "--warmup", "20"),
        ("--warmup", "1", "--models", "simple_cnn", "--batch-size", "8"),
    ),
    "epoch_time": Benchmark(
        epoch_time.main,
        EPOCHS,
        ("--warmup", "1", "--dataset", "digits", "--images", "64", "--batch-size", "32", "--workers", "1"),
    ),
    "fraction_of_peak": Benchmark(
        fraction_of_peak.main,
        ("--compile",),
        ("--warmup", "1", "--models", "resnet18", "--batch-size", "2", "--image-size", "28", "--matrix", "64"),
    ),
    "collective_traffic": Benchmark(
        collective_traffic.main, (), ("--warmup", "1", "--processes", "2", "--shapes", "simple_cnn, 28")
    ),
    "memory": Benchmark(memory.main, (), ("--model", "simple_cnn", "--batch-size", "4", "--image-size", "28")),
    "time_to_accuracy": Benchmark(
        time_to_accuracy.main,
        ("--rounds", "5"),
        ("--datasets", "digits", "--objectives", "baseline", "--epochs", "1", "--accuracy", "10"),
    ),
    "step_time_graph": Benchmark(step_time.main, (*STEPS, "--channels-last", "yes", "--cuda-graph", *BOTH), None),
    "epoch_time_graph": Benchmark(epoch_time.main, (*EPOCHS, "--cuda-graph"), None),
}
ON_CPU = ("collective_traffic",)  # gloo's, wherever it runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description="All benchmarks on a GPU, or a smoke run.")
    parser.add_argument("--only", nargs="+", default=list(BENCHMARKS), choices=BENCHMARKS, help="all")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write NAME_cuda.json there (not of a smoke run)")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        print("no GPU is visible here: a smoke run of each benchmark on the CPU, and no figure of a GPU is measured\n")
    for name in options.only:
        benchmark = BENCHMARKS[name]
        print(f"--- {name}", flush=True)
        if on_gpu:
            device = "cpu" if name in ON_CPU else "cuda"
            written = ("--json", str(options.out / f"{name}_cuda.json")) if options.out else ()
            benchmark.main([*benchmark.gpu, "--device", device, *written])
        elif benchmark.smoke is None:
            print("needs a GPU: not measured")
        else:
            benchmark.main([*benchmark.smoke, *ROUNDS, "--device", "cpu"])
        print(flush=True)


if __name__ == "__main__":
    main()
