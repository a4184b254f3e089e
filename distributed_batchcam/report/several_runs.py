"""What a report shows of several runs: a table, accuracy against explanation quality, and each run's class maps."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from distributed_batchcam.errors import InputError
from distributed_batchcam.measures import FIGURES

from . import pictures, plots
from .run_files import RunFiles, read_maps
from .wording import MISSING, bare_figure_text, count, figure_title, number, path_text, plain, printable

_MOST_GROUPS = 12  # that get plots; the largest
_MOST_MARKS = 8  # λ written beside points of one plot
_MOST_MAPS = 10  # classes of a run whose maps are shown
_FIGURES = (
    *("accuracy", "ece", "class_cam_ssim", "cam_ssim", "cam_l1", "relevance_mass", "patch_mass", "insertion_auc"),
    *("deletion_auc", "average_drop", "sensitivity", "random_logit_ssim"),
)
_QUALITIES = ("class_cam_ssim", "relevance_mass", "insertion_auc", "patch_mass")  # axes of the plots
# Options that differ between runs without changing what is computed, or that have a column of their own.
_NO_COLUMN = {
    *("data_root", "cache_images", "workers", "device", "log_every", "keep_checkpoints", "tracker", "group", "tags"),
    *("checkpoint_every", "timeout", "max_bad_steps"),
    "debug",
    *("model", "dataset", "objective", "weight", "image_size", "seed", "epochs"),
}


class Failure(NamedTuple):
    """A run directory that cannot be in the table."""

    name: str
    reason: str


class Entry(NamedTuple):
    """A cell of the table; `value` is what a number sorts by, None where it is missing."""

    text: str
    value: float | None = None


class Column(NamedTuple):
    """A column of the table; numbers sort as numbers, the better end first."""

    title: str
    entry: Callable[[RunFiles], Entry]
    numeric: bool = True
    first: str = "ascending"
    hint: str = ""


class Row(NamedTuple):
    """A run in the table."""

    place: int
    name: str
    link: str  # to the run's own report, where there is one
    dataset: str
    model: str
    objective: str
    entries: list[Entry]


class SummaryEntry(NamedTuple):
    """An entry of summary.json: a column where runs differ, otherwise a phrase."""

    title: str
    common: str
    numeric: bool


_ENTRIES = {
    "dataset": SummaryEntry("Data set", "{}", numeric=False),
    "model": SummaryEntry("Model", "{}", numeric=False),
    "objective": SummaryEntry("Objective", "{}", numeric=False),
    "image_size": SummaryEntry("Side, pixels", "images of {0}×{0} pixels", numeric=True),
    "epochs": SummaryEntry("Epochs", "{} epochs", numeric=True),
    "seed": SummaryEntry("Seed", "seed {}", numeric=True),
}


class Group(NamedTuple):
    """Runs that may be compared: one data set, model and image size."""

    title: str
    plots: list[Markup]


class Card(NamedTuple):
    """A run's class maps."""

    place: int
    name: str
    facts: str
    classes: str = ""
    prototypes: str = ""
    maps: str = ""
    note: str = ""
    command: str = ""


def several_runs(runs: Sequence[RunFiles], failures: Sequence[Failure], output: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    runs = sorted(runs, key=lambda run: (run.text("dataset"), run.text("model"), -(run.figure("accuracy") or 0)))
    named = list(zip(runs, _names(runs), strict=True))
    columns = _columns(runs)
    return {
        "columns": columns,
        "rows": [_row(place, run, name, columns, output) for place, (run, name) in enumerate(named, 1)],
        "common": [entry.common.format(text) for name, entry in _ENTRIES.items() if (text := _common(runs, name))],
        "filters": [
            (entry.title, name, sorted({run.text(name) for run in runs}))
            for name, entry in _ENTRIES.items()
            if not entry.numeric
        ],
        "groups": _groups(named),
        "most_groups": _MOST_GROUPS,
        "cards": [_card(place, run, name) for place, (run, name) in enumerate(named, 1)],
        "has_paper": any(run.paper is not None for run in runs),
        "without_evidence": [run for run in runs if not (run.test and run.test.has_independent_figures)],
        "failures": failures,
    }


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Paths below what all have in common."""
    if len(runs) == 1:
        return [runs[0].name]
    paths = [run.path.absolute() for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    return [path_text(path.relative_to(common)) for path in paths]


def _own_report(run: RunFiles, output: Path) -> str:
    report = run.path / "report.html"
    if not report.is_file():
        return ""
    relative = os.path.relpath(report, output.parent)
    # "./": a folder may have a name like "javascript:…".
    return "./" + quote(os.fsencode(relative))


# Table ---------------------------------------------------------------------------------------------------


def _row(place: int, run: RunFiles, name: str, columns: Sequence[Column], output: Path) -> Row:
    return Row(
        place,
        name,
        _own_report(run, output),
        run.text("dataset"),
        run.text("model"),
        run.text("objective"),
        [column.entry(run) for column in columns],
    )


def _columns(runs: Sequence[RunFiles]) -> list[Column]:
    columns = [_summary_column(name, entry) for name, entry in _ENTRIES.items() if not _common(runs, name)]
    columns.append(Column("λ", lambda run: Entry(MISSING if run.weight is None else f"{run.weight:g}", run.weight)))
    columns += [_option_column(name) for name in _differing_options(runs)]
    for name in _FIGURES:
        if any(run.figure(name) is not None for run in runs):
            columns.append(_figure_column(name))
        if name == "accuracy" and any(run.paper is not None for run in runs):
            columns.append(Column("Paper, %", lambda run: Entry(plain(run.paper, 2), run.paper), first="descending"))
            columns.append(Column("Ours − paper", _ahead_of_paper, first="descending", hint="in percentage points"))
    return columns


def _summary_column(name: str, entry: SummaryEntry) -> Column:
    return Column(entry.title, lambda run: Entry(run.text(name), run.number(name)), numeric=entry.numeric)


def _option_column(name: str) -> Column:
    return Column(
        printable(name, limit=40), lambda run: Entry(_option(run.options.get(name)), number(run.options.get(name)))
    )


def _figure_column(name: str) -> Column:
    first = "descending" if FIGURES[name].better == "higher" else "ascending"
    return Column(
        figure_title(name),
        lambda run: Entry(bare_figure_text(name, run.figure(name)), run.figure(name)),
        first=first,
        hint=FIGURES[name].description,
    )


def _ahead_of_paper(run: RunFiles) -> Entry:
    ours, paper = run.figure("accuracy"), run.paper
    if ours is None or paper is None:
        return Entry(MISSING)
    return Entry(("+" if ours >= paper else "") + plain(ours - paper, 2), ours - paper)


def _common(runs: Sequence[RunFiles], name: str) -> str:
    """The entry of the summary that all runs have in common, if they do."""
    values = {run.text(name) for run in runs}
    return values.pop() if len(values) == 1 else ""


def _differing_options(runs: Sequence[RunFiles]) -> list[str]:
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.options.items():
            values.setdefault(name, set()).add(_option(value))
    return [name for name, found in values.items() if len(found) > 1 and name not in _NO_COLUMN]


def _option(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(value, limit=60)


# Plots ---------------------------------------------------------------------------------------------------


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point is on the Pareto front: no other is at least as high in both and higher in one."""
    return [
        not any(other[0] >= point[0] and other[1] >= point[1] and other != point for other in points)
        for point in points
    ]


def _groups(named: Sequence[tuple[RunFiles, str]]) -> list[Group]:
    members: dict[tuple[str, ...], list[tuple[int, RunFiles, str]]] = {}
    for place, (run, name) in enumerate(named, 1):
        key = (run.text("dataset"), run.text("model"), f"{count(run.number('image_size'))} pixels")
        members.setdefault(key, []).append((place, run, name))
    comparable = [(key, group) for key, group in members.items() if len(group) > 1]
    comparable.sort(key=lambda item: -len(item[1]))
    series = sorted({run.text("objective") for run, _ in named}, key=lambda text: (text != "baseline", text))
    return [
        Group(" · ".join(key), _plots(f"group-{index}", " · ".join(key), group, series))
        for index, (key, group) in enumerate(comparable[:_MOST_GROUPS])
    ]


def _plots(prefix: str, title: str, group: Sequence[tuple[int, RunFiles, str]], series: Sequence[str]) -> list[Markup]:
    found = []
    for quality in _QUALITIES:
        points = _points(group, quality)
        if len(points) > 1:
            x = plots.Axis(FIGURES[quality].title, FIGURES[quality].better == "higher")
            label = f"{title}: accuracy over {FIGURES[quality].title}"
            found.append(plots.scatter(f"{prefix}-{quality}", label, points, x, plots.Axis("accuracy, %"), series))
    return found


def _points(group: Sequence[tuple[int, RunFiles, str]], quality: str) -> list[plots.Point]:
    chosen = [
        (place, run, name, x, y)
        for place, run, name in group
        if (x := run.figure(quality)) is not None and (y := run.figure("accuracy")) is not None
    ]
    sign = 1 if FIGURES[quality].better == "higher" else -1
    front = pareto_front([(sign * x, y) for *_, x, y in chosen])
    marks = _MOST_MARKS if sum(front) <= _MOST_MARKS else 0
    return [
        plots.Point(
            x,
            y,
            run.text("objective"),
            f"#run-{place}",
            f"{name}: accuracy {y:.2f} %, {FIGURES[quality].title} {plain(x)}",
            mark=f"λ {run.weight:g}" if on_front and marks and run.weight is not None else "",
            front=on_front,
        )
        for (place, run, name, x, y), on_front in zip(chosen, front, strict=True)
    ]


# Class maps ----------------------------------------------------------------------------------------------


def _card(place: int, run: RunFiles, name: str) -> Card:
    weight = "" if run.weight is None else f", λ = {run.weight:g}"
    facts = f"{run.text('dataset')}, {run.text('model')}, {run.text('objective')}{weight}"
    if run.test is None:
        return Card(place, name, facts, note="Not evaluated:", command=run.evaluate_command)
    classes = range(min(_MOST_MAPS, len(run.test.classes)))
    try:
        maps = read_maps(run, run.test, classes)
    except InputError as error:
        return Card(place, name, facts, note=f"No class maps: {error}.", command=run.evaluate_command)
    names = ", ".join(run.test.classes[index] for index in classes)
    more = len(run.test.classes) - len(classes)
    return Card(
        place,
        name,
        facts,
        classes=f"{names} and {more} more" if more else names,
        prototypes=pictures.gray(maps.prototypes),
        maps=pictures.heat(maps.all),
    )
