"""Timing shared by the benchmarks: variants interleaved in one run, compared round by round, written down.

Round by round each variant runs once, and ratios are taken within a round: what slows the machine for a while
slows all variants alike, and so cancels. The order is drawn anew in every round: after a fixed neighbour a variant
would always find the same caches and the same free memory, which shifts it by more than the differences of interest.
"""

import argparse
import gc
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

import distributed_batchcam
from distributed_batchcam.checkpoint import write_atomic
from distributed_batchcam.malloc import keep_freed_memory, use_huge_pages

Passed = bool | Literal["not measured"]


class Spread(NamedTuple):
    """Median and spread of n figures."""

    n: int
    median: float
    q1: float
    q3: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least two values; quartiles by interpolation."""
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(len(values), median, q1, q3, min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One variant: its times, round by round, and its time ÷ that of the reference in the same round."""

    name: str
    times: Sequence[float]
    ratio: Spread

    @property
    def seconds(self) -> Spread:
        """Median and spread of the times."""
        return Spread.of(self.times)


@dataclass(frozen=True)
class Table:
    """Variants that were timed together; the first row is the reference."""

    title: str
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, title: str, seconds: Mapping[str, Sequence[float]]) -> "Table":
        """From the times of each variant, round by round; the first is the reference of the ratios."""
        reference = next(iter(seconds.values()))
        return cls(
            title,
            tuple(Row(name, times, _ratio(times, reference)) for name, times in seconds.items()),
        )

    def row(self, name: str) -> Row:
        """The row of a variant."""
        return next(row for row in self.rows if row.name == name)

    def ratio(self, name: str, reference: str) -> Spread:
        """Of two variants' times in the same round."""
        return _ratio(self.row(name).times, self.row(reference).times)

    def text(self) -> str:
        """The table as plain text."""
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"{self.title} (n = {self.rows[0].seconds.n})",
            f"  {'':{width}}  {'median':>10}  {'quartiles':>21}  {'÷ ' + self.rows[0].name:>12}  {'quartiles':>17}",
        ]
        for row in self.rows:
            times, ratio = row.seconds, row.ratio
            time_range = f"{1e3 * times.q1:.2f} … {1e3 * times.q3:.2f} ms"
            ratio_range = f"{_short(ratio.q1)} … {_short(ratio.q3)}"
            lines.append(
                f"  {row.name:{width}}  {1e3 * times.median:>7.2f} ms  {time_range:>21}  "
                f"{_short(ratio.median):>12}  {ratio_range:>17}"
            )
        return "\n".join(lines)


def _ratio(times: Sequence[float], reference: Sequence[float]) -> Spread:
    return Spread.of([mine / other for mine, other in zip(times, reference, strict=True)])


@dataclass(frozen=True)
class Bar:
    """What a figure (in `unit`) has to reach; `measured` is None where this run's settings are not the bar's."""

    what: str
    direction: Literal["at most", "at least"]
    limit: float
    measured: float | None
    unit: str = "×"

    @property
    def passed(self) -> Passed:
        """Whether the bar is reached."""
        if self.measured is None:
            return "not measured"
        return self.measured <= self.limit if self.direction == "at most" else self.measured >= self.limit

    def text(self) -> str:
        """The bar and its outcome in one line."""
        outcomes = {True: "passed", False: "MISSED", "not measured": "not measured"}
        measured = "" if self.measured is None else f"{_short(self.measured)}{self.unit}, "
        return f"bar: {self.what} {self.direction} {self.limit:g}{self.unit}: {measured}{outcomes[self.passed]}"


def measure(
    title: str, variants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int, device: torch.device
) -> Table:
    """Time the variants, interleaved; the first is the reference of the ratios.

    Args:
        title: of the table.
        variants, rounds, warmup, device: see `interleaved`.
    """
    return Table.of(title, interleaved(variants, rounds=rounds, warmup=warmup, device=device))


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """The seconds of each variant in every round.

    Args:
        variants: what to time, by name.
        rounds: n, how often each runs and is timed; at least 2.
        warmup: how often each runs before that, untimed.
        device: whose work to wait for before each look at the clock.
    """
    for run in variants.values():
        for _ in range(warmup):
            run()
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    orders = random.Random(0)
    with _no_garbage_collection():
        for _ in range(rounds):
            for name in orders.sample(names, len(names)):
                seconds[name].append(_time(variants[name], device))
    return seconds


def _time(run: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    result = run()
    _wait_for(device)
    elapsed = time.perf_counter() - start
    del result  # Freeing what a variant returns is not part of its work.
    return elapsed


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As `timeit` does: a collection would hit whichever variant happens to run."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def steady(threads: int) -> Iterator[None]:
    """Let torch use so many CPU threads, and memory as `batchcam train` does (see `malloc`)."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    use_huge_pages()
    keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        keep_freed_memory(False)


# Command line and report --------------------------------------------------------------------------


def argument_parser(
    module: str, description: str, *, rounds: int, fewest: int = 2, warmup: int = 3
) -> argparse.ArgumentParser:
    """The options that all benchmarks share; a benchmark that has no warm-up (0) has no option for it."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{module}", description=description)
    parser.add_argument(
        "--rounds", type=_at_least(fewest), default=rounds, help="timed runs of each variant (%(default)s)"
    )
    if warmup:
        parser.add_argument("--warmup", type=_at_least(1), default=warmup, help="untimed runs before (%(default)s)")
    else:
        parser.set_defaults(warmup=0)
    parser.add_argument("--threads", type=_at_least(1), default=2, help="CPU threads of torch (%(default)s)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    return parser


def _at_least(low: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    return whole_number


positive = _at_least(1)
several = _at_least(2)


def choose_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device of `--device`; ends the program where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible here")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def report(
    benchmark: str,
    options: argparse.Namespace,
    device: torch.device,
    tables: Sequence[Table],
    bars: Sequence[Bar],
    *,
    packages: Sequence[str] = (),
    further: Mapping[str, Any] | None = None,
) -> None:
    """Print the tables and bars, and write them to `--json`, if given, with hardware, versions and settings.

    Args:
        benchmark: its name.
        options, device: what it ran with.
        tables, bars: what it measured.
        packages: further distributions whose versions matter.
        further: entries that the file is to hold besides.
    """
    hardware, versions = _hardware(device), _versions(packages)
    cpu = "{cpu} with {instructions}, {cores} cores".format(**hardware)
    print(f"{cpu}, {options.threads} threads; GPU: {hardware['gpu'] or 'none'}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for table in tables:
        print(f"\n{table.text()}")
    print()
    for bar in bars:
        print(bar.text())
    if options.json is None:
        return
    document = {
        "benchmark": benchmark,
        "device": device.type,
        "hardware": hardware,
        "versions": versions,
        "threads": options.threads,
        "rounds": options.rounds,
        "warmup": options.warmup,
        "tables": [
            {
                "title": table.title,
                "reference": table.rows[0].name,
                "rows": [
                    {"name": row.name, "seconds": row.seconds._asdict(), "ratio": row.ratio._asdict()}
                    for row in table.rows
                ],
            }
            for table in tables
        ],
        "bars": [{**asdict(bar), "passed": bar.passed} for bar in bars],
        **(further or {}),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.json, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def _hardware(device: torch.device) -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    import timm

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "distributed_batchcam": distributed_batchcam.__version__,
        **{name: metadata.version(name) for name in packages},
    }


def _short(value: float) -> str:
    """Three decimals up to 10, then ever fewer: four figures that mean something."""
    if value < 10:
        return f"{value:.3f}"
    return f"{value:.{max(0, 3 - int(math.log10(value)))}f}"
