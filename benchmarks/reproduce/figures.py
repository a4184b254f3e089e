"""The pictures of docs/results.md: class maps like the paper's figures, and accuracy against explanation quality."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure
from safetensors.torch import load_file

from .collect import read_runs
from .stages import EXPLAINING, Workshop

OBJECTIVES = ("baseline", *EXPLAINING)
_INCHES = 0.75  # of a map
_DOTS = 100


def draw_figures(results: Path, workshop: Workshop) -> None:
    """Draw what the runs at hand allow; pictures of others that were drawn before stay."""
    results.mkdir(parents=True, exist_ok=True)
    for dataset in ("mnist", "fashion_mnist"):
        _class_maps(
            results / f"class_maps_{dataset}.png",
            list(workshop.runs("table_a1_held_out-simple_cnn")),
            dataset,
            OBJECTIVES,
        )
        decoyed = [*workshop.runs("decoy_weights"), *workshop.runs("decoy_seeds")]
        _class_maps(results / f"class_maps_decoy_{dataset}.png", decoyed, f"decoy_{dataset}", None)
    _pareto(results / "pareto.png", read_runs(results, "weights"))


def _class_maps(file: Path, runs: Iterable[Path], dataset: str, objectives: Iterable[str] | None) -> None:
    """Prototypes above, and below them each objective's map of every class over the whole test set, seed 0."""
    rows: dict[str, Any] = {}
    for path in runs:
        summary = json.loads((path / "summary.json").read_text())
        if (summary["dataset"], summary["seed"]) == (dataset, 0) and summary["model"] == "simple_cnn":
            label = summary["objective"] + ("" if objectives or not summary["weight"] else f" {summary['weight']:g}")
            rows[label if summary["objective"] != "baseline" else "baseline"] = path
    order = [name for name in objectives if name in rows] if objectives else sorted(rows)
    if not order:
        return
    tensors = {name: load_file(rows[name] / "evaluation-test.safetensors") for name in order}
    shown = [("prototypes", tensors[order[0]]["prototypes"]), *((name, tensors[name]["class_maps"]) for name in order)]
    classes = len(shown[0][1])
    figure = Figure(figsize=(_INCHES * (classes + 1.6), _INCHES * len(shown)), dpi=_DOTS)
    for row, (name, maps) in enumerate(shown):
        for column, image in enumerate(maps):
            axes = figure.add_subplot(len(shown), classes, row * classes + column + 1)
            axes.imshow(image, cmap="gray" if row == 0 else "inferno", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.subplots_adjust(left=1.5 / (classes + 1.6), right=0.995, top=0.99, bottom=0.01, wspace=0.05, hspace=0.05)
    figure.savefig(file)


def _pareto(file: Path, runs: list[dict[str, Any]]) -> None:
    """Accuracy on held-out images against class SSIM, a line per objective along λ."""
    if not runs:
        return
    figure = Figure(figsize=(8, 4.5), dpi=_DOTS, layout="constrained")
    axes = figure.add_subplot()
    for objective in OBJECTIVES:
        along = sorted((run for run in runs if run["objective"] == objective), key=lambda run: float(run["weight"]))
        axes.plot(
            [run["class_cam_ssim"] for run in along],
            [run["best_valid_accuracy"] for run in along],
            marker="o",
            label=objective,
        )
        for run in along if objective != "baseline" else ():
            place = (run["class_cam_ssim"], run["best_valid_accuracy"])
            axes.annotate(f"{run['weight']:g}", place, fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set_xlabel("SSIM of class maps and prototypes (test set)")
    axes.set_ylabel("validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file)
