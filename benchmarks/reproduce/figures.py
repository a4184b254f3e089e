"""The pictures of docs/results.md: maps of classes and of images, and accuracy against explanation quality."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor

from distributed_batchcam import explain
from distributed_batchcam.checkpoint import load_run
from distributed_batchcam.data.splits import balanced_selection
from distributed_batchcam.evaluate_run import load_run_data
from distributed_batchcam.explanations import Explanations

from .collect import read_runs
from .stages import DECOY_WEIGHTS, EXPLAINING, PLAIN, Workshop

OBJECTIVES = ("baseline", *EXPLAINING)
_INCHES = 0.8  # of a map
_LABEL_INCHES = 1.7
_DOTS = 100
_CORNER = (0.25, 1.2)  # class SSIM and percent below the best of each


def draw_figures(results: Path, workshop: Workshop) -> None:
    """Draw what the runs at hand allow, of the first seed; pictures of others that were drawn before stay."""
    results.mkdir(parents=True, exist_ok=True)
    tables = ("table_a1_held_out-simple_cnn", "table_a1-simple_cnn")
    table = next((name for name in tables if any(workshop.runs(name))), tables[0])
    for decoy, plain in PLAIN.items():
        _draw_maps(results, workshop, table, plain, OBJECTIVES)
        _draw_maps(results, workshop, "decoy_weights", decoy, ("baseline", *DECOY_WEIGHTS))
    weights = read_runs(results, "weights")
    if weights:
        _save(_pareto(weights), results / "pareto.png")


def _draw_maps(results: Path, workshop: Workshop, stage: str, dataset: str, objectives: Sequence[str]) -> None:
    """Both pictures of a data set, if each run of the first seed that docs/results holds is at hand."""
    here = {}
    for path in workshop.runs(stage):
        run = json.loads((path / "summary.json").read_text())
        if (run["dataset"], run["seed"]) == (dataset, 0):
            here[run["objective"], run["weight"]] = path
    recorded = [run for run in read_runs(results, stage) if (run["dataset"], run["seed"]) == (dataset, 0)]
    if not here or {(run["objective"], run["weight"]) for run in recorded} - here.keys():
        return
    order = sorted(here, key=lambda key: (objectives.index(key[0]), key[1]))
    runs = {name if name == "baseline" else f"{name}\nλ {weight:g}": here[name, weight] for name, weight in order}
    files = [load_file(path / "evaluation-test.safetensors") for path in runs.values()]
    rows = [("prototypes", files[0]["prototypes"]), *zip(runs, (file["class_maps"] for file in files), strict=True)]
    _save(_class_maps(rows), results / f"class_maps_{dataset}.png")
    _save(_image_maps(runs), results / f"image_maps_{dataset}.png")


def _class_maps(rows: Sequence[tuple[str, Tensor]]) -> Figure:
    """Prototypes above, and below them each run's map of every class over the whole test set."""
    figure, cells = _grid(len(rows), len(rows[0][1]))
    for row, (name, maps) in enumerate(rows):
        _label(cells[row][0], name)
        for cell, image in zip(cells[row], maps, strict=True):
            cell.imshow(image.numpy(), cmap="gray" if row == 0 else "inferno", vmin=0, vmax=1)
    return figure


def _image_maps(runs: dict[str, Path]) -> Figure:
    """The first test image of each class above, and below it each run's map of the class that it predicts."""
    first = load_run(next(iter(runs.values())))
    images = load_run_data(first).test
    chosen = balanced_selection(images.targets, len(first.classes)).tolist()
    figure, cells = _grid(len(runs) + 1, len(chosen))
    _label(cells[0][0], "images")
    for cell, index in zip(cells[0], chosen, strict=True):
        cell.imshow(images[index][0].numpy(), cmap="gray", vmin=0, vmax=255)
    for row, (name, path) in zip(cells[1:], runs.items(), strict=True):
        _label(row[0], name)
        explanations: Explanations = explain(path, indices=chosen, device="cpu")
        assert explanations.targets is not None
        for place, cell in enumerate(row):
            cell.imshow(images[chosen[place]][0].numpy(), cmap="gray", vmin=0, vmax=255)
            map_ = explanations.predicted_maps[place].numpy()
            cell.imshow(map_, cmap="inferno", vmin=0, vmax=1, alpha=0.6, extent=_extent(images))
            if int(explanations.predicted[place]) != int(explanations.targets[place]):
                cell.spines[:].set(color="red", linewidth=2.5)
    return figure


def _extent(images: Any) -> tuple[float, float, float, float]:
    """Where a map lies over an image of any other size."""
    side = images.shape[-1]
    return (-0.5, side - 0.5, side - 0.5, -0.5)


def _pareto(runs: list[dict[str, Any]]) -> Figure:
    """Accuracy on held-out images against class SSIM, a line per objective along λ; at the right its best corner."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    overview, corner = figure.subplots(1, 2, width_ratios=(2, 3))
    for objective in OBJECTIVES:
        along = sorted((run for run in runs if run["objective"] == objective), key=lambda run: float(run["weight"]))
        places = [(run["class_cam_ssim"], run["best_valid_accuracy"]) for run in along]
        for axes in (overview, corner):
            axes.plot(*zip(*places, strict=True), marker="o", markersize=4, label=objective)
        for run, place in zip(along, places, strict=True):
            if objective != "baseline":
                offset = {"xytext": (4, 3), "textcoords": "offset points", "annotation_clip": True}
                corner.annotate(f"{run['weight']:g}", place, fontsize=7, **offset)
    best_map, best_accuracy = (max(run[name] for run in runs) for name in ("class_cam_ssim", "best_valid_accuracy"))
    corner.set_xlim(best_map - _CORNER[0], best_map + _CORNER[0] / 20)
    corner.set_ylim(best_accuracy - _CORNER[1], best_accuracy + _CORNER[1] / 20)
    for axes in (overview, corner):
        axes.set_xlabel("SSIM of class maps and prototypes (test set)")
        axes.grid(alpha=0.3)
    overview.set_ylabel("validation accuracy, %")
    corner.set_title("the best corner, with λ", fontsize=9)
    overview.legend(fontsize=8)
    return figure


def _grid(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    width = _LABEL_INCHES + _INCHES * columns
    figure = Figure(figsize=(width, _INCHES * rows))
    figure.subplots_adjust(left=_LABEL_INCHES / width, right=0.995, top=0.99, bottom=0.01, wspace=0.06, hspace=0.06)
    cells = figure.subplots(rows, columns, squeeze=False).tolist()
    for cell in (cell for row in cells for cell in row):
        cell.set(xticks=[], yticks=[])
    return figure, cells


def _label(cell: Axes, text: str) -> None:
    cell.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8, parse_math=False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=_DOTS)
