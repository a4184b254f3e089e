"""An evaluation in a run directory: figures as JSON, maps as safetensors, class maps as a picture."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from .checkpoint import write_atomic
from .data import ImageSet
from .evaluation import Evaluation
from .explainer import Explainer
from .explanations import Explanations, explain_images
from .report.figures import save_class_maps

MOST_MISTAKES = 24


def explain_mistakes(
    explainer: Explainer, images: ImageSet, evaluation: Evaluation, classes: Sequence[str], device: torch.device
) -> Explanations:
    """Explanations of the most confident wrong predictions, at most `MOST_MISTAKES`."""
    positions = evaluation.confident_mistakes(MOST_MISTAKES)
    shown = torch.zeros(len(positions), *images.shape)
    for place, position in enumerate(positions.tolist()):
        shown[place] = images[position] / 255
    targets = evaluation.targets[positions]
    return explain_images(explainer, shown, targets, evaluation.prototypes.to(device), classes)


def save_evaluation(
    folder: Path,
    name: str,
    evaluation: Evaluation,
    mistakes: Explanations,
    classes: Sequence[str],
    about: dict[str, Any],
    title: str,
) -> dict[str, Any]:
    """Write evaluation-NAME.json, evaluation-NAME.safetensors and class_maps-NAME.png.

    Args:
        folder: where.
        name: such as `test`.
        evaluation: of the image set.
        mistakes: explanations of the most confident mistakes, see `explain_mistakes`.
        classes: C names.
        about: what was evaluated, for the head of the JSON file.
        title: of the picture.

    Returns:
        `about` and the scalar figures.
    """
    scalars = {**about, "samples": len(evaluation), **evaluation.figures()}
    positions = evaluation.confident_mistakes(MOST_MISTAKES)
    calibration = evaluation.calibration()
    edges = [bin_ / len(calibration.counts) for bin_ in range(len(calibration.counts) + 1)]
    document = {
        **scalars,
        "classes": list(classes),
        "per_class": [
            {"class": label, **row} for label, row in zip(classes, evaluation.figures_by_class(), strict=True)
        ],
        "confusion": evaluation.confusion().tolist(),
        "calibration": [
            {
                "low": low,
                "high": high,
                "samples": int(samples),
                "confidence": _number(confidence),
                "accuracy": _number(accuracy),
            }
            for low, high, samples, confidence, accuracy in zip(
                edges, edges[1:], *(part.tolist() for part in calibration), strict=False
            )
        ],
        "mistakes": [
            {"index": index, "target": target, "predicted": predicted, "confidence": confidence}
            for index, target, predicted, confidence in zip(
                positions.tolist(),
                evaluation.targets[positions].tolist(),
                evaluation.predicted[positions].tolist(),
                evaluation.per_image["confidence"][positions].tolist(),
                strict=True,
            )
        ],
    }
    rows = evaluation.class_rows()
    tensors: dict[str, Tensor | None] = {
        "prototypes": evaluation.prototypes,
        "class_maps": evaluation.class_maps,
        "class_maps_right": evaluation.right_maps,
        "class_maps_wrong": evaluation.wrong_maps,
        "counts_right": rows["right"][1],
        "counts_wrong": rows["wrong"][1],
        "mistake_images": mistakes.images,
        "mistake_maps_predicted": mistakes.predicted_maps,
        "mistake_maps_target": mistakes.target_maps,
        **{f"per_image/{key}": values for key, values in evaluation.per_image.items()},
    }
    packed = save({key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None})
    write_atomic(folder / f"evaluation-{name}.safetensors", packed)
    save_class_maps(folder / f"class_maps-{name}.png", evaluation.prototypes, rows, classes, title)
    write_atomic(folder / f"evaluation-{name}.json", json.dumps(document, indent=2, allow_nan=False).encode())
    return scalars


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
