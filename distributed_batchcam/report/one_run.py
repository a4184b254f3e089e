"""What a report shows of one run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray

from distributed_batchcam.distances import ssim
from distributed_batchcam.errors import InputError
from distributed_batchcam.measures import FIGURES

from . import pictures, plots
from .run_files import CONFIG, EvaluationFile, RunFiles, config_text, read_history, read_maps, read_mistakes
from .wording import (
    bare_figure_text,
    count,
    duration,
    figure_text,
    figure_title,
    number,
    plain,
    quoted,
    similarity_text,
)

MOST_CLASSES = 48  # whose maps are shown; of more, the least accurate
_LARGEST_TABLE = 25  # classes of a confusion matrix in numbers; a larger one is a picture
_MOST_ERRORS = 5  # of the confusion matrix, in words
_MOST_POINTS = 400  # of a curve
_PREDICTIONS = ("accuracy", "top5_accuracy", "loss", "ece")
_BY_CLASS = ("class_cam_ssim", "relevance_mass", "patch_mass")  # beside each class's accuracy


class Tile(NamedTuple):
    """A figure that a reader should see first."""

    title: str
    value: str
    remark: str = ""


class FigureRow(NamedTuple):
    """A figure with what it means."""

    title: str
    values: list[str]  # one per evaluated image set
    better: str
    description: str
    source: str


class FigureGroup(NamedTuple):
    """Figures of one kind."""

    title: str
    remark: str
    rows: list[FigureRow]


class MapTile(NamedTuple):
    """A picture of a map with two lines of text."""

    title: str
    picture: str  # empty: there is no such image
    text: str


class ClassCard(NamedTuple):
    """A class's prototype beside its maps."""

    name: str
    tiles: list[MapTile]


class MistakeCard(NamedTuple):
    """A wrong prediction with its maps."""

    position: int  # in the image set
    target: str
    predicted: str
    confidence: str
    image: str
    predicted_map: str
    target_map: str


class ClassRow(NamedTuple):
    """A class's accuracy and figures."""

    name: str
    samples: str
    accuracy: float | None
    accuracy_text: str
    figures: list[str]


class Cell(NamedTuple):
    """A cell of the confusion matrix; `level` 0 to 10 is its share of the row."""

    images: int
    level: int
    right: bool


class Confusion(NamedTuple):
    """The confusion matrix as a table, or as a picture where it is too large; and its largest errors in words."""

    rows: list[tuple[str, list[Cell]]]
    picture: str
    worst: list[tuple[str, str, int]]
    named: bool  # whether the classes have names rather than digits or letters


class Panel(NamedTuple):
    """A titled plot."""

    title: str
    plot: Markup


class Note(NamedTuple):
    """What a run lacks, and the command that makes it."""

    text: str
    command: str = ""


def one_run(run: RunFiles) -> dict[str, Any]:
    """Everything that the template shows; what the run lacks is in `notes`."""
    notes = [Note(problem) for problem in run.problems]
    test = run.test
    if test is None:
        text = "Confusion, calibration, class maps, mistakes and all independent evidence have not been measured."
        notes.append(Note(text, run.evaluate_command))
    elif not test.has_independent_figures:
        notes.append(Note("Figures that are independent evidence have not been measured.", run.evaluate_command))
    return {
        "run": run,
        "facts": _facts(run),
        "tiles": _tiles(run),
        "splits": [split.replace("-", " ") for split in run.evaluations] or ["test"],
        "groups": _groups(run),
        "measured": _measured(test) if test else "",
        "class_cards": _class_cards(run, test, notes) if test else [],
        "classes": len(test.classes) if test else 0,
        "mistakes": _mistakes(run, test, notes) if test else [],
        "class_figures": [figure_title(name) for name in _figures_by_class(test)] if test else [],
        "class_rows": _class_rows(test) if test else [],
        "confusion": _confusion(test) if test and test.confusion else None,
        "calibration": _calibration(test) if test and test.calibration else None,
        "panels": _panels(run, notes),
        "config": _config(run, notes),
        "repeat": f"batchcam train --config {quoted(run.path / CONFIG)} --out NEW_RUN_DIR",
        "environment": _environment(run),
        "notes": notes,
    }


# Figures -------------------------------------------------------------------------------------------------


def _facts(run: RunFiles) -> str:
    weight = "" if run.weight is None else f", λ = {run.weight:g}"
    size = run.number("image_size")
    pixels = "" if size is None else f" at {size:.0f}×{size:.0f} pixels"
    return f"{run.text('model')} on {run.text('dataset')}{pixels}, {run.text('objective')}{weight}"


def _tiles(run: RunFiles) -> list[Tile]:
    paper = "" if run.paper is None else f"the paper has {run.paper:.2f} %"
    tiles = [Tile("Test accuracy", figure_text("accuracy", run.figure("accuracy")), paper)]
    for name in ("class_cam_ssim", "relevance_mass", "insertion_auc", "ece"):
        if (value := run.figure(name)) is not None:
            remark = "" if FIGURES[name].independent else "what the objectives optimise"
            tiles.append(Tile(FIGURES[name].title, figure_text(name, value), remark))
    tiles.append(Tile("Parameters", count(run.number("params"))))
    speed = f"{count(run.number('images_per_second'))} images/s"
    tiles.append(Tile("Training", duration(run.number("train_seconds")), speed))
    return tiles


def _groups(run: RunFiles) -> list[FigureGroup]:
    if run.summary.get("objective") == "baseline":
        optimised = "This run did not optimise them, but runs with another objective did: compare with care."
    else:
        optimised = (
            "They show that training did what it was told to, not that the model is right for the right reasons."
        )
    closeness = ("cam_l1", "cam_ssim", "class_cam_ssim")
    groups = (
        FigureGroup("Predictions", "", _rows(run, _PREDICTIONS)),
        FigureGroup(
            "Closeness to prototypes: no independent evidence",
            f"These are what the objectives optimise. {optimised}",
            _rows(run, closeness),
        ),
        FigureGroup(
            "Independent evidence",
            "No objective optimises these. Maps are those of the target class.",
            _rows(run, [name for name in FIGURES if name not in _PREDICTIONS and FIGURES[name].independent]),
        ),
    )
    return [group for group in groups if group.rows]


def _rows(run: RunFiles, names: Sequence[str]) -> list[FigureRow]:
    rows = []
    for name in names:
        values = [evaluation.figures.get(name) for evaluation in run.evaluations.values()] or [run.figure(name)]
        if any(value is not None for value in values):
            about = FIGURES[name]
            texts = [figure_text(name, value) for value in values]
            rows.append(FigureRow(about.title, texts, about.better, about.description, about.source))
    return rows


def _measured(test: EvaluationFile) -> str:
    parts = [f"Measured on {test.samples:,} test images"]
    if test.mask:
        parts.append(f"relevance mass and rank against the mask “{test.mask}”")
    if test.subset is not None and test.figures.get("insertion_auc") is not None:
        parts.append(f"sensitivity, deletion and insertion on {test.subset:,} of them")
    return "; ".join(parts) + "."


def _figures_by_class(test: EvaluationFile) -> list[str]:
    return [name for name in _BY_CLASS if any(row.get(name) is not None for row in test.per_class)]


def _class_rows(test: EvaluationFile) -> list[ClassRow]:
    names = _figures_by_class(test)
    return [
        ClassRow(
            name,
            count(row.get("samples")),
            row.get("accuracy"),
            bare_figure_text("accuracy", row.get("accuracy")),
            [bare_figure_text(figure, row.get(figure)) for figure in names],
        )
        for name, row in zip(test.classes, test.per_class, strict=False)
    ]


def _confusion(test: EvaluationFile) -> Confusion:
    table = np.array(test.confusion, dtype=np.float64)
    shares = table / table.sum(1, keepdims=True).clip(min=1)
    errors = table - np.diag(np.diag(table))
    most = errors.flatten().argsort(kind="stable")[::-1][:_MOST_ERRORS]
    pairs = [divmod(int(place), len(table)) for place in most if errors.flat[place] > 0]
    worst = [(test.classes[target], test.classes[seen], int(table[target, seen])) for target, seen in pairs]
    if len(table) > _LARGEST_TABLE:
        return Confusion([], pictures.heat(shares[None]), worst, named=True)
    rows = []
    for target, name in enumerate(test.classes):
        levels = np.ceil(10 * shares[target]).astype(int)
        cells = [Cell(int(table[target, seen]), int(levels[seen]), seen == target) for seen in range(len(table))]
        rows.append((name, cells))
    return Confusion(rows, "", worst, named=any(len(name) > 3 for name in test.classes))


def _calibration(test: EvaluationFile) -> Markup:
    bins = [
        plots.ReliabilityBin(50 * (one.low + one.high), 100 * one.confidence, 100 * one.accuracy, one.samples)
        for one in test.calibration
        if one.confidence is not None and one.accuracy is not None
    ]
    return plots.reliability("calibration", "Accuracy over confidence", bins)


# Maps ----------------------------------------------------------------------------------------------------


def _class_cards(run: RunFiles, test: EvaluationFile, notes: list[Note]) -> list[ClassCard]:
    shown = list(range(len(test.classes)))
    if len(shown) > MOST_CLASSES:
        accuracies = [row.get("accuracy") for row in test.per_class] or [None] * len(shown)
        order = sorted(shown, key=lambda index: (accuracies[index] is None, accuracies[index] or 0.0))
        shown = sorted(order[:MOST_CLASSES])
    try:
        maps = read_maps(run, test, shown)
    except InputError as error:
        notes.append(Note(f"No class maps: {error}.", run.evaluate_command))
        return []
    wholes = maps.counts_right + maps.counts_wrong
    columns = (
        ("all", maps.all, wholes),
        ("right", maps.right, maps.counts_right),
        ("wrong", maps.wrong, maps.counts_wrong),
    )
    similarities = {title: _similarities(found, maps.prototypes) for title, found, _ in columns}
    cards = []
    for row, index in enumerate(shown):
        tiles = [MapTile("prototype", pictures.gray(maps.prototypes[row : row + 1]), "")]
        for title, found, counts in columns:
            images = int(counts[row])
            picture = pictures.heat(found[row : row + 1]) if images > 0 else ""
            tiles.append(
                MapTile(f"{title} {images:,}", picture, similarity_text(similarities[title][row]) if picture else "")
            )
        cards.append(ClassCard(test.classes[index], tiles))
    return cards


def _similarities(maps: NDArray[np.float32], prototypes: NDArray[np.float32]) -> list[float | None]:
    values = ssim(torch.from_numpy(maps), torch.from_numpy(prototypes)).tolist()
    return [number(value) for value in values]


def _mistakes(run: RunFiles, test: EvaluationFile, notes: list[Note]) -> list[MistakeCard]:
    if not test.mistakes:
        return []
    try:
        found = read_mistakes(run, test)
    except InputError as error:
        notes.append(Note(f"No pictures of mistakes: {error}.", run.evaluate_command))
        return []
    return [
        MistakeCard(
            mistake.index,
            test.classes[mistake.target],
            test.classes[mistake.predicted],
            f"{100 * mistake.confidence:.1f} %",
            pictures.photo(image),
            pictures.photo_under(image, predicted),
            pictures.photo_under(image, target),
        )
        for mistake, image, predicted, target in zip(test.mistakes, *found, strict=True)
    ]


# Course and circumstances --------------------------------------------------------------------------------

_PANELS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    ("Accuracy, %", (("train", "train", "accuracy"), ("validation", "valid", "accuracy"))),
    ("Cross-entropy", (("train", "train", "loss_class"), ("validation", "valid", "loss"))),
    ("Loss on the explanations, before λ", (("train", "train", "loss_cam"),)),
    ("Total loss", (("train", "train", "loss"),)),
    (
        "Similarity to prototypes, validation",
        (("class SSIM", "valid", "class_cam_ssim"), ("SSIM", "valid", "cam_ssim")),
    ),
    ("L1 distance to prototypes, validation", (("L1", "valid", "cam_l1"),)),
    ("Learning rate", (("lr", "train", "lr"),)),
)
"""Title, and per curve: label, split and name in metrics.jsonl."""


def _panels(run: RunFiles, notes: list[Note]) -> list[Panel]:
    try:
        history = read_history(run.path)
    except InputError as error:
        notes.append(Note(f"No learning curves: {error}."))
        return []
    panels = []
    for index, (title, wanted) in enumerate(_PANELS):
        lines = [line for line in (_line(history, *curve) for curve in wanted) if any(line.y)]
        if lines:
            panels.append(Panel(title, plots.curves(f"curve-{index}", f"{title}, over epochs", lines)))
    return panels


def _line(history: Sequence[dict[str, Any]], label: str, split: str, name: str) -> plots.Line:
    steps_per_epoch = max((number(line.get("step")) or 0) / max(number(line.get("epoch")) or 1, 1) for line in history)
    points = [
        (step / max(steps_per_epoch, 1), value)
        for line in history
        if line.get("split") == split
        and (step := number(line.get("step"))) is not None
        and (value := number(line.get(name))) is not None
    ]
    kept = points[:: -(-len(points) // _MOST_POINTS) or 1]
    return plots.Line(label, [x for x, _ in kept], [y for _, y in kept])


def _config(run: RunFiles, notes: list[Note]) -> str:
    try:
        return config_text(run.path)
    except InputError as error:
        notes.append(Note(f"No configuration: {error}."))
        return ""


def _environment(run: RunFiles) -> list[tuple[str, str]]:
    entries = (
        ("Device", run.text("device")),
        ("Processes", count(run.number("world_size"))),
        ("torch", run.text("torch")),
        ("Parameters", count(run.number("params"))),
        ("Multiply–adds per image", f"{plain(run.number('gflops'))} G"),
        ("Seed", count(run.number("seed"))),
        ("Epochs", count(run.number("epochs"))),
        ("Best epoch", f"{count(run.number('best_epoch'))} (validated on {run.text('validated_on')})"),
        ("Test accuracy of the best epoch", figure_text("accuracy", run.number("best_test_accuracy"))),
    )
    return list(entries)
