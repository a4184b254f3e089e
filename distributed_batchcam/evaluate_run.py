"""Evaluate the model of a run in full: accuracy, calibration, and the quality of its explanations."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .checkpoint import Run, load_run
from .data import DATASETS, FOREGROUND, Data, ImageSet, Loader, Masks, load_data, load_masks
from .data.splits import balanced_selection
from .errors import InputError
from .evaluation import evaluate
from .evaluation_files import explain_mistakes, save_evaluation
from .explainer import Explainer
from .measures import default_masks, every_measure
from .report.html import write_report
from .runtime import start_accelerator
from .trainer import EVALUATION_BATCH

Split = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate, and against what."""

    split: Split = "test"
    dataset: str | None = None  # another than the run's own
    data_root: Path | None = None
    masks: str | None = None  # `foreground`, `none` or a folder; None: foreground where the background is black
    threshold: float | None = None  # of the foreground, in [0, 1); None: `FOREGROUND`
    subset: int = 500  # images for the costly measures
    device: str = "auto"
    out: Path | None = None  # default: the run directory


def evaluate_run(path: Path, options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate the model of a run or checkpoint; under a launcher, over all processes.

    Writes evaluation-NAME.json, evaluation-NAME.safetensors and class_maps-NAME.png, where NAME is the split,
    after the checkpoint and the data set where these are not the run's final model and own data; and the run's
    report again.

    Returns:
        The scalar figures, after what was evaluated.

    Raises:
        InputError: not a run, data that do not fit it, or a folder that cannot be written to.
    """
    run = load_run(path)
    out = options.out or run.path
    if not out.is_dir() or not os.access(out, os.W_OK):
        raise InputError(f"{out} is not a writable folder: name one with --out")
    # In float32 as `explain` does, and on any device: a run trained on GPUs can be looked at without one.
    here = {"device": options.device, "precision": "no", "sync_batchnorm": False, "debug": False}
    accelerator = start_accelerator(run.config.model_copy(update=here))
    data = load_run_data(run, options.dataset, options.data_root)
    images: ImageSet = getattr(data, options.split)
    masks, mask = _masks(data, images, options)
    measures = every_measure(
        len(images), len(run.classes), masks, balanced_selection(images.targets, max(1, options.subset))
    )
    loader = Loader(
        images,
        EVALUATION_BATCH,
        accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        workers=run.config.workers,
    )
    explainer = Explainer(run.model.to(accelerator.device), run.normalize)
    result = evaluate(explainer, loader, run.prototypes["valid"].to(accelerator.device), measures, progress=True)
    about = {
        "run": str(run.path),
        **({"checkpoint": run.name} if run.name else {}),
        "dataset": data.name,
        "split": options.split,
        "mask": mask,
        "subset": min(options.subset, len(images)),
    }
    if accelerator.is_main_process:
        own = data.name == run.config.dataset
        name = "-".join([*filter(None, [run.name]), *([] if own else [data.name]), options.split])
        what = f"{data.name} {options.split} set, {run.config.model}, {run.config.objective}"
        title = f"{what}: {result.accuracy:.2f} % right"
        mistakes = explain_mistakes(explainer, images, result, run.classes, accelerator.device)
        try:
            save_evaluation(out, name, result, mistakes, run.classes, about, title)
        except OSError as error:
            raise InputError(f"{out} cannot be written to: {error.strerror or error}") from error
        if out == run.path and (run.path / "summary.json").is_file():
            write_report([run.path])
    accelerator.wait_for_everyone()
    return {**about, "samples": len(result), **result.figures()}


def load_run_data(run: Run, dataset: str | None = None, data_root: Path | None = None) -> Data:
    """The run's own data set, or another with the same classes, at the run's image size.

    Raises:
        InputError: classes or channels that are not those of the model.
    """
    own = dataset is None or dataset == run.config.dataset
    data = load_data(
        dataset or run.config.dataset,
        data_root=data_root or (run.config.data_root if own else None),
        image_size=run.image_size,
        valid_size=run.config.valid_size if own else None,
        cache_images=run.config.cache_images if own else "auto",
    )
    if data.classes != run.classes:
        raise InputError(
            f"{run.path} was trained on the classes {', '.join(run.classes)}; {data.name} has {', '.join(data.classes)}"
        )
    if data.channels != run.channels:
        raise InputError(
            f"the model of {run.path} takes images of {run.channels} channel(s), {data.name} has {data.channels}"
        )
    return data


def _masks(data: Data, images: ImageSet, options: EvaluationOptions) -> tuple[dict[str, Masks], str | None]:
    """Masks by the prefix of their figures, and what `relevance` is measured against, in words."""
    threshold = FOREGROUND if options.threshold is None else options.threshold
    masks = default_masks(data.name, images, threshold)
    if options.masks == "foreground" and not DATASETS[data.name].foreground:
        raise InputError(f"--masks foreground needs images on black, {data.name} has others: name a folder of masks")
    if options.masks in (None, "foreground") and "relevance" in masks:
        return masks, f"foreground above {threshold:g}"
    if options.threshold is not None:
        raise InputError("--threshold is of the foreground, which is not measured here: leave it out")
    masks.pop("relevance", None)
    if options.masks in (None, "none"):
        return masks, None
    return {"relevance": load_masks(options.masks, images, data.classes), **masks}, options.masks
