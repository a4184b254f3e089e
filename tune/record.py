"""Where the trials of a sweep stand, as sweep.json says it, and the leaderboard that is made of them."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple

from distributed_batchcam.errors import InputError

from .space import Options, Space, Trial, make_space
from .storage import LEADERBOARD, SWEEP, TRIALS, Storage

State = Literal["waiting", "running", "finished", "stopped", "failed"]

FIGURES = (
    *("best_valid_accuracy", "best_test_accuracy", "test_accuracy"),
    *("class_cam_ssim", "cam_ssim", "cam_l1", "relevance_mass"),
)
"""Entries of summary.json on the leaderboard; `best_test_accuracy` is of the epoch that validation chose."""
RANKED_BY = FIGURES[0]


@dataclass
class TrialRecord:
    """Where one trial stands."""

    id: str
    name: str
    axes: Options
    state: State = "waiting"
    epoch: int = 0
    valid_accuracy: float | None = None
    """After the last epoch, percent."""
    attempts: int = 0
    reason: str = ""
    """Why it failed."""
    summary: dict[str, Any] = field(default_factory=dict)
    """summary.json of the finished run."""


@dataclass
class SweepRecord:
    """What sweep.json holds."""

    id: str
    space: Space
    plan: dict[str, Any]
    """How trials are chosen: searcher, samples, seed, scheduler."""
    trials: dict[str, TrialRecord] = field(default_factory=dict)
    """By id."""

    def add(self, trial: Trial) -> TrialRecord:
        """The record of a trial, made where there is none."""
        return self.trials.setdefault(trial.id, TrialRecord(trial.id, trial.name, trial.axes))

    def count(self, state: State) -> int:
        """Trials in a state."""
        return sum(trial.state == state for trial in self.trials.values())

    def take_summary(self, trial: TrialRecord, storage: Storage) -> None:
        """What a trial's run directory says: it is finished once its summary is there."""
        content = storage.read(f"{TRIALS}/{trial.name}/summary.json")
        if content is not None:
            trial.summary = json.loads(content)
            trial.state, trial.reason, trial.epoch = "finished", "", trial.summary["epochs"]

    def save(self, storage: Storage) -> None:
        """Write sweep.json and leaderboard.csv."""
        document = {
            "id": self.id,
            "plan": self.plan,
            "space": self.space.model_dump(mode="json", exclude_none=True),
            "counts": {state: self.count(state) for state in ("finished", "stopped", "failed", "running", "waiting")},
            "leaderboard": [standing.as_dict() for standing in leaderboard(self.trials.values())],
            "trials": [asdict(trial) for trial in self.trials.values()],
        }
        storage.write(SWEEP, json.dumps(document, indent=1).encode())
        storage.write(LEADERBOARD, leaderboard_csv(self).encode())

    @classmethod
    def load(cls, storage: Storage) -> "SweepRecord | None":
        """The sweep in a storage; None where there is none.

        Raises:
            InputError: a damaged sweep.json.
        """
        content = storage.read(SWEEP)
        if content is None:
            return None
        try:
            document = json.loads(content)
            space = make_space(document["space"], f"space in {SWEEP}")
            trials = {entry["id"]: TrialRecord(**entry) for entry in document["trials"]}
            return cls(document["id"], space, document["plan"], trials)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{storage}/{SWEEP} is damaged ({error}): start anew with another --storage") from error


# Leaderboard ---------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """Mean and standard deviation (n - 1; none for a single seed) of an entry over seeds."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        return cls(mean(values), stdev(values) if len(values) > 1 else None)

    def text(self, decimals: int = 2) -> str:
        """For people."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{decimals}f}"
        return f"{self.mean:.{decimals}f}{spread}"


@dataclass(frozen=True)
class Standing:
    """Trials that differ by their seed alone."""

    axes: Options
    seeds: int
    figures: dict[str, Figure]
    trials: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For programs: a cell for each column of leaderboard.csv, and the names of the trials."""
        return {**self.cells(), "trials": list(self.trials)}

    def cells(self) -> dict[str, Any]:
        """The cells of leaderboard.csv."""
        figures = {
            f"{name}_{part}": value
            for name, figure in self.figures.items()
            for part, value in (("mean", figure.mean), ("sd", figure.deviation))
        }
        return {**self.axes, "seeds": self.seeds, **figures}


def leaderboard(trials: Iterable[TrialRecord]) -> list[Standing]:
    """Finished trials grouped over seeds, the best mean validation accuracy first."""
    groups: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        if trial.state == "finished":
            axes = {name: value for name, value in trial.axes.items() if name != "seed"}
            groups.setdefault(json.dumps(axes, sort_keys=True), []).append(trial)
    standings = [
        Standing(
            axes={name: value for name, value in group[0].axes.items() if name != "seed"},
            seeds=len(group),
            figures={name: Figure.of(values) for name in FIGURES if (values := _numbers(group, name))},
            trials=tuple(trial.name for trial in group),
        )
        for group in groups.values()
    ]
    return sorted(standings, key=lambda standing: -standing.figures[RANKED_BY].mean)


def _numbers(group: Sequence[TrialRecord], name: str) -> list[float]:
    """The entry of all summaries of a group; empty where one lacks it."""
    values = [trial.summary.get(name) for trial in group]
    numbers = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return numbers if len(numbers) == len(values) else []


def leaderboard_csv(record: SweepRecord) -> str:
    """leaderboard.csv: one line per combination of options, means and standard deviations over seeds."""
    axes = [name for name in record.space.axes if name != "seed"]
    columns = ["place", *axes, "seeds", *(f"{name}_{part}" for name in FIGURES for part in ("mean", "sd"))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for place, standing in enumerate(leaderboard(record.trials.values()), 1):
        writer.writerow({"place": place, **standing.cells()})
    return text.getvalue()


def leaderboard_text(record: SweepRecord, most: int = 20) -> str:
    """The best of the leaderboard as a table for a terminal."""
    standings = leaderboard(record.trials.values())
    axes = [name for name in record.space.axes if name != "seed"]
    titles = {
        "best_valid_accuracy": "validation, %",
        "best_test_accuracy": "test, %",
        "class_cam_ssim": "class CAM SSIM",
    }
    rows = [["", *axes, "seeds", *titles.values()]]
    for place, standing in enumerate(standings[:most], 1):
        options = [_cell(standing.axes.get(name)) for name in axes]
        figures = [standing.figures[name].text() if name in standing.figures else "" for name in titles]
        rows.append([str(place), *options, str(standing.seeds), *figures])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(standings) > most:
        lines.append(f"… and {len(standings) - most} more in {LEADERBOARD}")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
