"""Run directories read back from their files alone, none of which is trusted."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open

from distributed_batchcam.errors import InputError
from distributed_batchcam.measures import FIGURES

from .paper import Setting, paper_accuracy
from .wording import number, path_text, printable, quoted

CONFIG, SUMMARY, METRICS = "config.yaml", "summary.json", "metrics.jsonl"
_LARGEST = 256 * 2**20  # bytes of a file that a report is willing to read
_LARGEST_CONFIG = 2**20
# Figures that summary.json calls otherwise.
_IN_SUMMARY = {"accuracy": "test_accuracy", "loss": "test_loss"}


Text = Annotated[str, AfterValidator(printable)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Share = Annotated[float, Field(ge=0, le=1)]


def _figures(found: Any) -> dict[str, float | None]:
    if not isinstance(found, dict):
        raise ValueError("should be an object")
    return {name: number(found[name]) for name in ("samples", *FIGURES) if name in found}


Figures = Annotated[dict[str, float | None], BeforeValidator(_figures)]


class Mistake(BaseModel):
    """A wrong prediction."""

    index: Count  # in the image set
    target: Count
    predicted: Count
    confidence: Share  # probability of the predicted class


class Bin(BaseModel):
    """The predictions whose confidence lies in (low, high]; no confidence and accuracy where there are none."""

    low: Share
    high: Share
    samples: Count
    confidence: Share | None
    accuracy: Share | None


class EvaluationFile(BaseModel):
    """evaluation-SPLIT.json."""

    split: Text
    samples: Count
    figures: Figures
    classes: tuple[Text, ...] = Field(min_length=1)
    confusion: list[list[Count]] = []  # (C, C), rows are targets
    per_class: list[Figures] = []  # C of them
    calibration: list[Bin] = []
    mistakes: list[Mistake] = []  # the most confident first
    mask: Text | None = None
    subset: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        classes = len(self.classes)
        if any(len(row) != classes for row in self.confusion) or len(self.confusion) not in (0, classes):
            raise ValueError("confusion is not a table of classes by classes")
        if len(self.per_class) not in (0, classes):
            raise ValueError("per_class is not a list of all classes")
        if any(max(mistake.target, mistake.predicted) >= classes for mistake in self.mistakes):
            raise ValueError("mistakes name a class that is not there")
        return self

    @property
    def has_independent_figures(self) -> bool:
        """Whether anything was measured that the objectives do not optimise."""
        return any(self.figures.get(name) is not None for name in ("relevance_mass", "patch_mass", "insertion_auc"))


@dataclass(frozen=True)
class RunFiles:
    """What the files of a finished run say; `problems` names those that could not be read."""

    path: Path
    summary: dict[str, Any]
    options: dict[str, Any]
    evaluations: dict[str, EvaluationFile]  # by split, "test" first
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        return path_text(Path(self.path.absolute().name))

    @property
    def test(self) -> EvaluationFile | None:
        return self.evaluations.get("test")

    def text(self, name: str) -> str:
        """An entry of the summary for people."""
        return printable(self.summary.get(name))

    def number(self, name: str) -> float | None:
        """An entry of the summary for arithmetic."""
        return number(self.summary.get(name))

    def figure(self, name: str) -> float | None:
        """A figure on the test set, from the evaluation or else from the summary."""
        found = self.test.figures.get(name) if self.test else None
        return self.number(_IN_SUMMARY.get(name, name)) if found is None else found

    @property
    def weight(self) -> float | None:
        """λ; a baseline has none."""
        return None if self.summary.get("objective") == "baseline" else self.number("weight")

    @property
    def paper(self) -> float | None:
        """The paper's accuracy in the same setting, in percent."""
        size = self.number("image_size")
        if size is None:
            return None
        return paper_accuracy(Setting(self.text("model"), self.text("dataset"), self.text("objective"), int(size)))

    @property
    def evaluate_command(self) -> str:
        """What measures everything on the test set."""
        return f"batchcam evaluate {quoted(self.path)}"


class Maps(NamedTuple):
    """Prototypes and class maps of some classes: (n, h, w) each, in [0, 1]."""

    prototypes: NDArray[np.float32]
    all: NDArray[np.float32]
    right: NDArray[np.float32]
    wrong: NDArray[np.float32]
    counts_right: NDArray[np.float32]  # (n,)
    counts_wrong: NDArray[np.float32]


class MistakePictures(NamedTuple):
    """Images (m, 1 or 3, s, s) of mistakes, with the maps (m, h, w) of both classes."""

    images: NDArray[np.float32]
    predicted: NDArray[np.float32]
    target: NDArray[np.float32]


# Finding -------------------------------------------------------------------------------------------------


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory, finished or not."""
    return (path / CONFIG).is_file() or (path / SUMMARY).is_file()


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories among the paths, or anywhere below them, each once.

    Raises:
        InputError: a path that is no folder, or holds no run.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path_text(path)} does not exist: name a run directory")
        if not path.is_dir():
            raise InputError(f"{path_text(path)} is a file: name a run directory")
        runs = list(_runs_below(path))
        if not runs:
            raise InputError(
                f"{path_text(path)} is not a run directory and holds none: no {CONFIG} there (batchcam train makes one)"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_below(path: Path) -> Iterator[Path]:
    for folder, inner, _ in os.walk(path):
        if is_run(Path(folder)):
            inner.clear()
            yield Path(folder)
        inner.sort()


# Reading -------------------------------------------------------------------------------------------------


def read_run(path: Path) -> RunFiles:
    """A finished run's small files.

    Raises:
        InputError: an unfinished run, or one whose summary is damaged.
    """
    if not (path / SUMMARY).is_file():
        raise InputError(
            f"{path_text(path)} holds an unfinished run: no {SUMMARY} "
            f"(batchcam train --config {quoted(path / CONFIG)} --out {quoted(path)} --resume auto ends it)"
        )
    summary = _object(path / SUMMARY)
    if number(summary.get("test_accuracy")) is None:
        raise InputError(f"{path_text(path / SUMMARY)} has no test_accuracy: it is not a run's summary")
    problems = []
    try:
        options = _options(path / CONFIG)
    except InputError as error:
        options = {}
        problems.append(str(error))
    evaluations = {}
    for file in sorted(path.glob("evaluation-*.json"), key=lambda file: (file.stem != "evaluation-test", file.name)):
        try:
            evaluation = _evaluation(file)
        except InputError as error:
            problems.append(str(error))
        else:
            evaluations[evaluation.split] = evaluation
    return RunFiles(path, summary, options, evaluations, tuple(problems))


def config_text(path: Path) -> str:
    """config.yaml as it is.

    Raises:
        InputError: it cannot be read.
    """
    lines = _content(path / CONFIG, _LARGEST_CONFIG).decode("utf-8", "replace").splitlines()
    return "\n".join(printable(line, limit=1000) for line in lines)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in the order of their steps; of a repeated step, the later line.

    A run that was killed leaves its last line cut off: lines that are no JSON are passed over if others are.

    Raises:
        InputError: no line can be read.
    """
    lines: dict[tuple[Any, float], dict[str, Any]] = {}
    for raw in _content(path / METRICS).splitlines():
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and (step := number(line.get("step"))) is not None:
            lines[str(line.get("split")), step] = line
    if not lines:
        raise InputError(f"{path_text(path / METRICS)} has no line of metrics")
    return [lines[key] for key in sorted(lines, key=lambda key: key[1])]


def read_maps(run: RunFiles, evaluation: EvaluationFile, classes: Sequence[int]) -> Maps:
    """Prototypes and class maps of the classes with these numbers.

    Raises:
        InputError: the file is missing or damaged, or does not fit the evaluation.
    """
    file, total = _tensor_file(run, evaluation), len(evaluation.classes)
    maps = _rows(file, ("prototypes", "class_maps", "class_maps_right", "class_maps_wrong"), classes, total)
    counts = _rows(file, ("counts_right", "counts_wrong"), classes, total)
    if any(array.ndim != 3 or array.shape != maps[0].shape for array in maps) or any(
        array.ndim != 1 for array in counts
    ):
        raise InputError(f"{path_text(file)} does not hold one map per class")
    return Maps(*maps, *(np.nan_to_num(array) for array in counts))


def read_mistakes(run: RunFiles, evaluation: EvaluationFile) -> MistakePictures:
    """Images and maps of the evaluation's mistakes, all of them in the same order.

    Raises:
        InputError: the file is missing or damaged, or does not fit the evaluation.
    """
    file, total = _tensor_file(run, evaluation), len(evaluation.mistakes)
    names = ("mistake_images", "mistake_maps_predicted", "mistake_maps_target")
    images, predicted, target = _rows(file, names, range(total), total)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or predicted.ndim != 3 or target.ndim != 3:
        raise InputError(f"{path_text(file)} does not hold one image and two maps per mistake")
    return MistakePictures(images, predicted, target)


def _tensor_file(run: RunFiles, evaluation: EvaluationFile) -> Path:
    return run.path / f"evaluation-{evaluation.split}.safetensors"


def _rows(file: Path, names: Sequence[str], rows: Sequence[int], total: int) -> list[NDArray[np.float32]]:
    """Some rows of tensors that have `total` of them; the others are not read."""
    if not file.is_file():
        raise InputError(f"{path_text(file)} is missing")
    try:
        with safe_open(file, "numpy") as tensors:
            slices = [tensors.get_slice(name) for name in names]
            for name, piece in zip(names, slices, strict=True):
                shape = piece.get_shape()
                if not shape or shape[0] != total or 0 in shape[1:]:
                    raise InputError(
                        f"{path_text(file)}: {name} has the shape {tuple(shape)}, {total} rows belong there"
                    )
            if len(rows) == total:
                return [np.asarray(piece[:], np.float32) for piece in slices]
            return [np.concatenate([np.asarray(piece[row : row + 1], np.float32) for row in rows]) for piece in slices]
    except (OSError, SafetensorError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path_text(file)} is damaged: {printable(str(error))}") from error


def _content(file: Path, largest: int = _LARGEST) -> bytes:
    try:
        if file.stat().st_size > largest:
            raise InputError(f"{path_text(file)} is too large: more than {largest // 2**20} MiB")
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{path_text(file)} cannot be read: {error.strerror}") from error


def _object(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(_content(file))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path_text(file)} is damaged: it is not JSON") from error
    if not isinstance(document, dict):
        raise InputError(f"{path_text(file)} is damaged: it is not a JSON object")
    return document


def _options(file: Path) -> dict[str, Any]:
    """The options with a single value; of a run of any version, so without the checks of `RunConfig`."""
    try:
        # The C loader, where there is one, takes a tenth of the time; it is as safe.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        document = yaml.load(_content(file, _LARGEST_CONFIG), loader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path_text(file)} is damaged: it is not YAML") from error
    if not isinstance(document, dict):
        raise InputError(f"{path_text(file)} is damaged: it does not hold options")
    return {
        str(name): value
        for name, value in document.items()
        if value is None or isinstance(value, bool | int | float | str)
    }


def _evaluation(file: Path) -> EvaluationFile:
    document = _object(file)
    try:
        # The name of the file says which one it is: a copied file may say something else inside.
        return EvaluationFile.model_validate(
            {**document, "split": file.stem.removeprefix("evaluation-"), "figures": document}
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path_text(file)} is damaged: {printable(where)}: {printable(first['msg'])}") from error
