"""Finished runs as docs/results/*.json: lists of runs, each with its summary, its configuration and versions."""

import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from distributed_batchcam.checkpoint import write_atomic
from distributed_batchcam.evaluate_run import EvaluationOptions, evaluate_run
from distributed_batchcam.measures import FIGURES
from distributed_batchcam.run_directory import FREE_ON_RESUME
from tune.space import Space

from .decoys import decoy_figures
from .stages import PLAIN

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "ray", "distributed-batchcam")
_OF_A_MACHINE = ("data_root", "prototypes", "masks", "pretrained")


def collect(runs: Iterable[Path], **about: Any) -> list[dict[str, Any]]:
    """What is kept of runs; `about` is said of each of them. Those on decoys are measured further."""
    shown = tqdm(list(runs), desc="measuring", unit=" runs", disable=None, leave=False)
    return [{**_one(path), **about} for path in shown]


def _one(path: Path) -> dict[str, Any]:
    summary = json.loads((path / "summary.json").read_text())
    config = _portable(yaml.safe_load((path / "config.yaml").read_text()))
    found = {**_figures(path), **summary, "config": config, "versions": _versions(summary["torch"])}
    if config["dataset"] in PLAIN:
        found |= decoy_figures(path, PLAIN[config["dataset"]])
    return found


def _figures(path: Path) -> dict[str, Any]:
    """What was measured of the final model on the test set: by training alone the cheap figures, by `evaluate` all."""
    document = json.loads((path / "evaluation-test.json").read_text())
    return {name: document[name] for name in FIGURES if name in document}


def evaluate_in_full(path: Path) -> None:
    """Measure what training leaves out, on 500 test images where it is costly; what is there is left alone."""
    if "insertion_auc" not in _figures(path):
        evaluate_run(path, EvaluationOptions())


def _versions(torch: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}, "torch": torch}


def by_trial(space: Space, runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Runs by the id of the trial of a space that they are of, in the order of its trials; the others are left out.

    Device, precision and the like, which may differ between a run and its continuation too, make no other trial.
    """
    found = {}
    known = list(runs)
    for trial in space.trials():
        options = _portable(trial.options)
        for run in known:
            if all(run["config"].get(name) == value for name, value in options.items() if name not in FREE_ON_RESUME):
                found[trial.id] = run
    return found


def _portable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Paths of the machine that a run was made on mean nothing on another: only their last part is kept."""
    return {
        name: Path(value).name if name in _OF_A_MACHINE and isinstance(value, str) else value
        for name, value in options.items()
    }


def write_runs(folder: Path, name: str, runs: list[dict[str, Any]]) -> None:
    """Write docs/results/NAME.json, unless there is nothing to say."""
    if runs:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{name}.json", json.dumps(runs, indent=1).encode())


def read_runs(folder: Path, name: str) -> list[dict[str, Any]]:
    """The runs of docs/results/NAME.json, none where it is not there."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else []
