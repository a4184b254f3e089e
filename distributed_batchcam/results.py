"""What a finished run leaves in its directory: figures, weights, the evaluation of the test set, a report."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from .checkpoint import save_model, save_prototypes, write_atomic
from .config import RunConfig
from .data import DATASETS, FOREGROUND, Data
from .evaluation import Evaluation
from .evaluation_files import explain_mistakes, save_evaluation
from .explainer import Explainer
from .report.html import write_report
from .run_directory import RunDirectory
from .runtime import describe
from .tracking import MetricsFile
from .training_state import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Results:
    """A finished run: what it was of, and what came of it."""

    config: RunConfig
    data: Data
    prototypes: dict[str, Tensor]  # (C, h, w) each
    explainer: Explainer  # of the last weights
    accelerator: "Accelerator"
    test: Evaluation
    best: Evaluation | None  # of the weights of the best epoch; None: they are lost

    def summary(self, progress: Progress, parameters: int, gflops: float) -> dict[str, Any]:
        """What summary.json holds."""
        config, figures = self.config, self.test.figures()
        return {
            "model": config.model,
            "dataset": config.dataset,
            "objective": config.objective,
            "weight": config.weight,
            "image_size": self.data.image_size,
            "seed": config.seed,
            "epochs": config.epochs,
            "world_size": self.accelerator.num_processes,
            "params": parameters,
            "gflops": gflops,
            "test_accuracy": figures.pop("accuracy"),
            "best_test_accuracy": None if self.best is None else self.best.accuracy,
            "best_epoch": progress.best_epoch,
            "best_valid_accuracy": progress.best_accuracy,
            "validated_on": "test" if self.data.valid is self.data.test else "held-out training images",
            "test_loss": figures.pop("loss"),
            **figures,
            "images_per_second": progress.images / max(progress.seconds, 1e-9),
            "train_seconds": progress.seconds,
            "device": describe(self.accelerator),
            "torch": torch.__version__,
        }

    def write(self, run_dir: RunDirectory, summary: dict[str, Any], metrics: MetricsFile) -> None:
        """Write all files, and what is missing of those that were written at the start.

        Raises:
            OSError, InUseError: the folder is full, gone or another run's.
        """
        path, config, data = run_dir.path, self.config, self.data
        run_dir.hold(config)
        write_identity(run_dir, config, self.prototypes)
        save_model(path / "model.safetensors", self.explainer.model, model_metadata(config, data))
        save_evaluation(
            path,
            "test",
            self.test,
            explain_mistakes(self.explainer, data.test, self.test, data.classes, self.accelerator.device),
            data.classes,
            {
                "run": str(path),
                "dataset": config.dataset,
                "split": "test",
                "mask": f"foreground above {FOREGROUND}" if DATASETS[config.dataset].foreground else None,
            },
            f"{data.name} test set, {config.model}, {config.objective}: {self.test.accuracy:.2f} % right",
        )
        write_atomic(path / "summary.json", json.dumps(summary, indent=2).encode())
        metrics.complete()
        write_report([path], path / "report.html")


def write_identity(run_dir: RunDirectory, config: RunConfig, prototypes: dict[str, Tensor]) -> None:
    """What is needed beside weights to use them."""
    run_dir.write_config(config)
    save_prototypes(run_dir.path / "prototypes.safetensors", prototypes)


def write_pictures(folder: Path, pictures: Mapping[str, Tensor]) -> None:
    """Write (h, w) in [0, 1] as NAME.png, in shades of gray."""
    for name, picture in pictures.items():
        buffer = BytesIO()
        Image.fromarray(picture.mul(255).round().to(torch.uint8).cpu().numpy()).save(buffer, "png")
        write_atomic(folder / f"{name}.png", buffer.getvalue())


def model_metadata(config: RunConfig, data: Data) -> dict[str, Any]:
    """What is needed beside config.yaml to build the model again, and to feed it."""
    return {
        "model": config.model,
        "classes": list(data.classes),
        "channels": data.channels,
        "image_size": data.image_size,
        "mean": list(data.mean),
        "std": list(data.std),
    }
