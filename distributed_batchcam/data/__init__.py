"""Datasets, their prototypes and masks, and the loader that lives on the device."""

from .datasets import DATASETS, Data, load_data, normalize_images
from .images import ImageSet
from .loader import Batch, Loader, dataset_prototypes
from .masks import FOREGROUND, Masks, foreground, load_masks, patches
from .prototype_files import load_prototypes, save_prototype_images
from .splits import random_selection

__all__ = [
    "DATASETS",
    "FOREGROUND",
    "Batch",
    "Data",
    "ImageSet",
    "Loader",
    "Masks",
    "dataset_prototypes",
    "foreground",
    "load_data",
    "load_masks",
    "load_prototypes",
    "normalize_images",
    "patches",
    "random_selection",
    "save_prototype_images",
]
