"""Datasets, their prototypes, and the loader that lives on the device."""

from .datasets import DATASETS, Data, load_data
from .images import ImageSet
from .loader import Batch, Loader, dataset_prototypes
from .prototype_files import load_prototypes

__all__ = [
    "DATASETS",
    "Batch",
    "Data",
    "ImageSet",
    "Loader",
    "dataset_prototypes",
    "load_data",
    "load_prototypes",
]
