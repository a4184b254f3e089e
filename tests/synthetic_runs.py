"""Run directories made up file by file, for what reads them back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FIGURES = {
    "accuracy": 90.0,
    "loss": 0.4,
    "ece": 1.5,
    "cam_l1": 0.12,
    "cam_ssim": 0.6,
    "class_cam_ssim": 0.8,
    "relevance_mass": 0.7,
    "insertion_auc": 0.88,
}


def write_run(
    path: Path,
    *,
    classes: tuple[str, ...] = ("ankle boot", "bag", "coat"),
    figures: dict[str, Any] | None = None,
    evaluated: bool = True,
    **summary: Any,
) -> Path:
    """A finished run directory of a few epochs, with figures and entries of the summary as given."""
    found = {**FIGURES, **(figures or {})}
    path.mkdir(parents=True, exist_ok=True)
    entries = {
        "model": "simple_cnn",
        "dataset": "mnist",
        "objective": "bcpl_l1",
        "weight": 0.1,
        "image_size": 28,
        "seed": 0,
        "epochs": 3,
        "world_size": 1,
        "params": 421642,
        "gflops": 0.0042,
        "test_accuracy": found["accuracy"],
        "best_test_accuracy": found["accuracy"],
        "best_epoch": 3,
        "validated_on": "held-out training images",
        "test_loss": found["loss"],
        **{name: found[name] for name in ("cam_l1", "cam_ssim", "class_cam_ssim")},
        "images_per_second": 1234.5,
        "train_seconds": 61.0,
        "device": "1 process on cpu",
        "torch": "2.11.0",
        **summary,
    }
    (path / "summary.json").write_text(json.dumps(entries))
    (path / "config.yaml").write_text(f"dataset: {json.dumps(entries['dataset'])}\nlr: 0.002\nbatch_size: 128\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _history()))
    if evaluated:
        write_evaluation(path, classes, found)
    return path


def write_evaluation(path: Path, classes: tuple[str, ...], figures: dict[str, Any], split: str = "test") -> None:
    """evaluation-SPLIT.json and .safetensors: every fifth image of a class is taken for the next class."""
    random, count = np.random.default_rng(0), len(classes)
    confusion = 8 * np.eye(count, dtype=int) + 2 * np.roll(np.eye(count, dtype=int), 1, axis=1)
    mistakes = [
        {"index": 7 * index, "target": index, "predicted": (index + 1) % count, "confidence": 0.9 - 0.1 * index}
        for index in range(min(count, 4))
    ]
    document = {
        "run": str(path),
        "dataset": "mnist",
        "split": split,
        "samples": int(confusion.sum()),
        "mask": "foreground above 0.5",
        "subset": 20,
        **figures,
        "classes": list(classes),
        "confusion": confusion.tolist(),
        "per_class": [
            {"class": name, "samples": 10, "accuracy": 80.0, "class_cam_ssim": 0.5, "relevance_mass": 0.7}
            for name in classes
        ],
        "calibration": [
            {"low": 0.0, "high": 0.5, "samples": 0, "confidence": None, "accuracy": None},
            {"low": 0.5, "high": 1.0, "samples": 10 * count, "confidence": 0.9, "accuracy": 0.8},
        ],
        "mistakes": mistakes,
    }
    (path / f"evaluation-{split}.json").write_text(json.dumps(document))
    maps = {
        name: random.random((count, 12, 12), np.float32)
        for name in ("prototypes", "class_maps", "class_maps_right", "class_maps_wrong")
    }
    shown = len(mistakes)
    tensors = {
        **maps,
        "counts_right": np.full(count, 8),
        "counts_wrong": np.full(count, 2),
        "mistake_images": random.random((shown, 1, 12, 12), np.float32),
        "mistake_maps_predicted": random.random((shown, 6, 6), np.float32),
        "mistake_maps_target": random.random((shown, 6, 6), np.float32),
    }
    save_file(tensors, path / f"evaluation-{split}.safetensors")


def _history() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for epoch in (1, 2, 3):
        train = {"loss": 2 / epoch, "loss_class": 1 / epoch, "loss_cam": 0.5, "accuracy": 80.0 + epoch, "lr": 1e-3}
        lines += [{"step": 10 * epoch - 5 * half, "epoch": epoch, "split": "train", **train} for half in (1, 0)]
        valid = {"accuracy": 80.0, "loss": 0.6, "cam_l1": 0.1, "cam_ssim": 0.5, "class_cam_ssim": 0.7}
        lines.append({"step": 10 * epoch, "epoch": epoch, "split": "valid", **valid})
    return lines
