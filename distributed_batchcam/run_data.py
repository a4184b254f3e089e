"""The data of a run: loaded as its configuration says, checked, with prototypes and masks."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .config import RunConfig
from .data import DATASETS, Data, Masks, dataset_prototypes, load_data, load_masks, load_prototypes, patches
from .errors import InputError
from .runtime import main_first

if TYPE_CHECKING:
    from accelerate import Accelerator

DEBUG_SAMPLES = 512
_SPLITS = {"train": "training", "valid": "validation", "test": "test"}


def load_run_data(config: RunConfig, accelerator: "Accelerator") -> Data:
    """The data set, on every rank; where it has to be downloaded, once.

    Raises:
        InputError: it cannot be had, or the batch does not suit it and the number of processes.
    """

    def load() -> Data:
        return load_data(
            config.dataset,
            data_root=config.data_root,
            image_size=config.image_size,
            valid_size=config.valid_size,
            limit=DEBUG_SAMPLES if config.debug else None,
            cache_images=config.cache_images,
        )

    data = main_first(accelerator, load) if DATASETS[config.dataset].downloads else load()
    _check_batch(config, len(data.train), accelerator.num_processes)
    return data


def run_prototypes(config: RunConfig, data: Data) -> dict[str, Tensor]:
    """Prototypes (C, h, w) of the training and validation sets; the user's own serve both."""
    if config.prototypes is not None:
        own = load_prototypes(config.prototypes, data.classes, data.image_size)
        return {"train": own, "valid": own.clone()}
    return {
        split: dataset_prototypes(images, data.num_classes, classes=data.classes, workers=config.workers)
        for split, images in (("train", data.train), ("valid", data.valid))
    }


def run_masks(config: RunConfig, data: Data) -> Masks:
    """Where the training images must not be judged by: the user's masks, or the decoys' patches.

    Raises:
        InputError: neither.
    """
    if config.masks is not None:
        return load_masks(config.masks, data.train, data.classes)
    if data.train.corners is None:
        raise InputError(f"--objective {config.objective} needs --masks FOLDER: {data.name} brings no masks of its own")
    return patches(data.train)


def facts_of(data: Data) -> dict[str, Any]:
    """What must be the same of the data for a run to go on."""
    counts = {f"{name} images": len(getattr(data, split)) for split, name in _SPLITS.items()}
    return {"classes": list(data.classes), **counts}


def _check_batch(config: RunConfig, images: int, processes: int) -> None:
    if config.batch_size > images:
        raise InputError(f"--batch-size {config.batch_size} is larger than the training set of {images:,} images")
    if config.batch_size // config.accumulate < processes:
        raise InputError(
            f"--batch-size {config.batch_size} in {config.accumulate} pieces leaves nothing for some of "
            f"{processes} processes: it is the global batch, raise it"
        )
