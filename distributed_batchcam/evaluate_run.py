"""Evaluate a finished run again, from its directory."""

import json
from pathlib import Path
from typing import Any

from .checkpoint import load_run, write_atomic
from .data import Loader, load_data
from .errors import InputError
from .evaluation import evaluate
from .report.figures import save_class_maps
from .runtime import start_accelerator
from .trainer import EVALUATION_BATCH


def evaluate_run(run_dir: Path, split: str, data_root: Path | None, device: str) -> dict[str, Any]:
    """Evaluate a run's model on its data set's `test` or `valid` images; under a launcher, over all processes.

    Writes evaluation-SPLIT.json and class_maps-SPLIT.png into the run directory.

    Raises:
        InputError: not a finished run, or data that do not fit it.
    """
    run = load_run(run_dir)
    config = run.config.model_copy(
        update={"device": device, "data_root": data_root or run.config.data_root, "debug": False}
    )
    accelerator = start_accelerator(config)
    data = load_data(
        config.dataset,
        data_root=config.data_root,
        image_size=run.image_size,
        valid_size=config.valid_size,
        cache_images=config.cache_images,
    )
    if data.classes != run.classes:
        raise InputError(f"{run_dir} was trained on classes {run.classes}, the data has {data.classes}")
    loader = Loader(
        getattr(data, split),
        EVALUATION_BATCH,
        accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        workers=config.workers,
    )
    prototypes = run.prototypes["valid"]
    model = run.model.to(accelerator.device)
    result = evaluate(model, loader, data, prototypes.to(accelerator.device), autocast=accelerator.autocast)
    figures: dict[str, Any] = {"run": str(run_dir), "split": split, "samples": result.samples, **result.figures()}
    if accelerator.is_main_process:
        title = f"{data.name} {split} set, {config.model}, {config.objective}: {result.accuracy:.2f} % right"
        write_atomic(run_dir / f"evaluation-{split}.json", json.dumps(figures, indent=2).encode())
        save_class_maps(run_dir / f"class_maps-{split}.png", prototypes, result.class_maps, data.classes, title)
    accelerator.wait_for_everyone()
    return figures
