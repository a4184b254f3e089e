"""What a sweep would do: its trials, and the GPU-hours that they ask for."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from distributed_batchcam.config import RunConfig
from distributed_batchcam.data import DATASETS, load_data
from distributed_batchcam.models import count_gflops, create_model

from .space import Trial

STEP_SECONDS = 2e-3
"""That a step takes at the least, however small the model: starting its kernels."""
_PASSES = 3
"""Forward passes that an image costs in training: one forward, and a backward of twice its operations."""
_MOST_LINES = 60
# What the published data sets have, so that nothing need be there, nor be downloaded, to plan a sweep.
_TRAIN_IMAGES = {"mnist": 60_000, "fashion_mnist": 60_000, "cifar10": 50_000}


class Cost(NamedTuple):
    """An estimate of what a trial costs."""

    operations: float
    hours: float  # on one GPU


def describe(trials: Sequence[Trial], note: str, tflops: float) -> str:
    """The trials, a line each, and an estimate of what they cost.

    Args:
        trials: of the sweep.
        note: what there is to say of how they were chosen; may be empty.
        tflops: 10¹² operations that a GPU does in a second.

    Raises:
        InputError: a model or a data set that cannot be had.
    """
    shown = [f"{trial.name}  {trial.config().epochs} epochs" for trial in trials[:_MOST_LINES]]
    if len(trials) > _MOST_LINES:
        shown.append(f"… and {len(trials) - _MOST_LINES:,} more")
    costs = [estimate(trial.config(), tflops) for trial in trials]
    return "\n".join(
        [
            *shown,
            f"{len(trials):,} trials{note}, {sum(trial.config().epochs for trial in trials):,} epochs",
            f"about {sum(cost.hours for cost in costs):.2g} GPU-hours, an estimate: "
            f"{sum(cost.operations for cost in costs):.2g} operations at {tflops:g} TFLOP/s (--tflops), "
            f"and at least {1000 * STEP_SECONDS:g} ms a step",
        ]
    )


def estimate(config: RunConfig, tflops: float) -> Cost:
    """Operations of a run (multiply-adds count as two), and hours on one GPU, evaluation not counted."""
    images = train_images(config)
    operations = 2e9 * _PASSES * _gflops(config.model, config.dataset, config.image_size) * images * config.epochs
    steps = images // config.batch_size * config.epochs
    return Cost(operations, max(operations / (tflops * 1e12), steps * STEP_SECONDS) / 3600)


def train_images(config: RunConfig) -> int:
    """Training images of a run, those held out for validation not counted."""
    whole = _TRAIN_IMAGES.get(config.dataset.removeprefix("decoy_"))
    if whole is None:
        data = load_data(
            config.dataset, data_root=config.data_root, image_size=config.image_size, valid_size=config.valid_size
        )
        return len(data.train)
    return whole - (min(whole // 10, 5000) if config.valid_size is None else config.valid_size)


@cache
def _gflops(model: str, dataset: str, image_size: int | None) -> float:
    data = DATASETS[dataset]
    size = image_size or data.image_size
    return count_gflops(create_model(model, 10, data.channels, size), data.channels, size)
