"""The datasets by name, each as training, validation and test images of one size.

To add one: a function `(root, size) -> Parts`, and a line in `DATASETS`.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from distributed_batchcam.errors import InputError, unknown_name

from .decoys import NATIVE_SIZE, check_size, with_patches
from .folders import read_folders
from .idx import find_idx, read_idx
from .images import FileImages, ImageSet, Parts, TensorImages
from .sources import fetch_files, require_folder, resolve_root
from .splits import balanced_selection, stratified_split

CacheImages = Literal["auto", "yes", "no"]

_MAX_IMAGE_SIZE = 4096
_AUTO_CACHE_BYTES = 2 * 1024**3
_MEMORY_BYTES = 32 * 1024**3
_MAX_VALID_SIZE = 5000

_DIGITS = tuple("0123456789")
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class Data:
    """A dataset ready for use; `valid` is `test` itself where no validation images were held out."""

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: ImageSet
    valid: ImageSet
    test: ImageSet
    data_root: Path | None
    """The folder it was read from; None for the embedded digits."""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def normalize(self, images: Tensor) -> Tensor:
        """`normalize_images` with this dataset's constants."""
        return normalize_images(images, self.mean, self.std)


def normalize_images(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std per channel, for images (N, ch, h, w) in [0, 1] on any device."""
    means, stds = _constants(mean, std, images.device, images.dtype)
    return (images - means) / stds


@cache
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """mean and std, each (1, ch, 1, 1), put on the device once: a copy per batch would wait for it."""
    with torch.inference_mode(False):  # an inference tensor could not serve in training later
        both = torch.tensor([mean, std], dtype=dtype).to(device)[..., None, None]
        return both[:1], both[1:]


def load_data(
    name: str,
    *,
    data_root: str | Path | None = None,
    image_size: int | None = None,
    valid_size: int | None = None,
    limit: int | None = None,
    cache_images: CacheImages = "auto",
) -> Data:
    """Load a dataset by name.

    Args:
        name: one of `DATASETS`.
        data_root: folder of the datasets in torchvision's layout, or the image folder itself; else
            $BATCHCAM_DATA, else data/.
        image_size: side s of the images in pixels; None takes the dataset's own.
        valid_size: how many training images to hold out for validation, stratified and the same in every
            run; None: a tenth, at most 5,000 (or the dataset's own validation part); 0: validate on test.
        limit: at most so many training, validation and test images, of every class alike.
        cache_images: decode image files once into memory: `yes`, `no`, or `auto`, up to 2 GiB of them.

    Raises:
        InputError: an unknown name, an option out of range, or files that are missing or damaged.
    """
    if name not in DATASETS:
        raise unknown_name("dataset", name, DATASETS)
    spec = DATASETS[name]
    size = spec.image_size if image_size is None else image_size
    _check_options(size, valid_size, limit, cache_images)
    root = resolve_root(data_root) if spec.on_disk else Path()
    parts = spec.read(root, size)
    train, valid, test = _split(parts, valid_size)
    _check_classes(name, train, parts.classes)
    if limit is not None:
        train, valid, test = _limited((train, valid, test), limit, len(parts.classes))
    train, valid, test = _at_size((train, valid, test), size, cache_images)
    return Data(
        name=name,
        classes=parts.classes,
        channels=spec.channels,
        image_size=size,
        mean=spec.mean,
        std=spec.std,
        train=train,
        valid=valid,
        test=test,
        data_root=root if spec.on_disk else None,
    )


def _check_options(size: int, valid_size: int | None, limit: int | None, cache_images: str) -> None:
    if not 1 <= size <= _MAX_IMAGE_SIZE:
        raise InputError(f"image size must be from 1 to {_MAX_IMAGE_SIZE} pixels, got {size}")
    if valid_size is not None and valid_size < 0:
        raise InputError(f"validation size must be 0 (validate on the test images) or more, got {valid_size}")
    if limit is not None and limit < 1:
        raise InputError(f"the limit of images must be at least 1, got {limit}")
    if cache_images not in get_args(CacheImages):
        raise unknown_name("value of cache_images", cache_images, get_args(CacheImages))


def _split(parts: Parts, valid_size: int | None) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Training, validation and test part; what the dataset does not bring is held out of training."""
    classes, train, test, valid = _with_test(parts)
    assert test is not None
    if valid_size == 0:
        return train, test, test
    if valid is not None:
        if valid_size is not None:
            raise InputError(
                f"the dataset brings {len(valid)} validation images of its own; leave the validation size "
                f"out to use them, or 0 to validate on the test images"
            )
        return train, valid, test
    if valid_size is None:
        valid_size = max(len(classes), min(len(train) // 10, _MAX_VALID_SIZE))
    train, valid = _held_out(train, valid_size, classes, "validation", "set the validation size to 0")
    return train, valid, test


def _with_test(parts: Parts) -> Parts:
    """The parts with a test part: where the dataset brings none, a fifth of its training images."""
    if parts.test is not None:
        return parts
    size = max(len(parts.classes), round(len(parts.train) / 5))
    train, test = _held_out(parts.train, size, parts.classes, "test", "bring a test/ folder")
    return parts._replace(train=train, test=test)


def _held_out(
    images: ImageSet, size: int, classes: tuple[str, ...], part: str, remedy: str
) -> tuple[ImageSet, ImageSet]:
    rest, held_out = stratified_split(images.targets, size, classes, part, remedy)
    return images.subset(rest), images.subset(held_out)


def _check_classes(name: str, train: ImageSet, classes: tuple[str, ...]) -> None:
    counts = torch.bincount(train.targets, minlength=len(classes)).tolist()
    empty = [label for label, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise InputError(f"{name}: no training image of class {', '.join(empty)}; every class needs one")


def _limited(
    parts: tuple[ImageSet, ImageSet, ImageSet], limit: int, num_classes: int
) -> tuple[ImageSet, ImageSet, ImageSet]:
    if limit < num_classes:
        raise InputError(f"a limit of {limit} images leaves classes without one; {num_classes} at least")
    return _each(parts, lambda part: part.subset(balanced_selection(part.targets, limit)))


def _at_size(
    parts: tuple[ImageSet, ImageSet, ImageSet], size: int, cache_images: CacheImages
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Resize images that are in memory; decode files into memory, or leave them to be streamed."""
    needed = sum(len(part) * part.shape[0] * size * size for part in set(parts))
    streamable = all(isinstance(part, FileImages) for part in parts)
    if cache_images == "no" and not streamable:
        raise InputError("cache_images 'no' is for imagefolder; this dataset is always held in memory")
    if streamable and (cache_images == "no" or (cache_images == "auto" and needed > _AUTO_CACHE_BYTES)):
        return parts
    if needed > _MEMORY_BYTES:
        raise InputError(
            f"the images take {needed / 1024**3:.0f} GiB of memory at {size}×{size}, more than "
            f"{_MEMORY_BYTES // 1024**3}; choose a smaller image size or a limit"
            + (", or do not cache them" if streamable else "")
        )
    return _each(parts, lambda part: _in_memory(part, size))


def _in_memory(part: ImageSet, size: int) -> ImageSet:
    if isinstance(part, FileImages):
        return part.decoded()
    assert isinstance(part, TensorImages)
    return part.resized(size)


def _each(
    parts: tuple[ImageSet, ImageSet, ImageSet], change: Callable[[ImageSet], ImageSet]
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """`change` applied to each part, once to the test part where that serves as validation too."""
    train, valid, test = parts
    changed = change(test)
    return change(train), changed if valid is test else change(valid), changed


def _read_digits(root: Path, size: int) -> Parts:
    """scikit-learn's 1,797 handwritten digits, 8×8 with 17 levels; it ships them, so no file is read."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).mul(255 / 16).round().to(torch.uint8)
    return Parts(_DIGITS, TensorImages(images[:, None], torch.from_numpy(found.target).long()))


def _read_mnist(root: Path, size: int) -> Parts:
    return _read_idx_files("mnist", "MNIST", _DIGITS, root)


def _read_fashion_mnist(root: Path, size: int) -> Parts:
    return _read_idx_files("fashion_mnist", "FashionMNIST", _FASHION, root)


def _read_idx_files(name: str, torchvision_name: str, classes: tuple[str, ...], root: Path) -> Parts:
    def fetch(folder: Path) -> None:
        from torchvision import datasets

        getattr(datasets, torchvision_name)(folder, download=True)  # checks the md5 sums

    raw = f"{torchvision_name}/raw"
    stems = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    missing = [f"{raw}/{stem}.gz" for stem in stems if find_idx(root / raw, stem) is None]
    fetch_files(name, root, missing, fetch)
    return Parts(classes, _read_idx_part(root / raw, "train", classes), _read_idx_part(root / raw, "t10k", classes))


def _read_idx_part(folder: Path, part: str, classes: tuple[str, ...]) -> TensorImages:
    images_path = find_idx(folder, f"{part}-images-idx3-ubyte")
    labels_path = find_idx(folder, f"{part}-labels-idx1-ubyte")
    assert images_path is not None
    assert labels_path is not None
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1).long()
    if images.shape[1:] != (28, 28):
        raise InputError(f"{images_path} holds images of {images.shape[1]}×{images.shape[2]}, not 28×28")
    if len(images) != len(labels):
        raise InputError(
            f"{images_path} holds {len(images)} images, {labels_path} {len(labels)} labels; they do not belong together"
        )
    if int(labels.max()) >= len(classes):
        raise InputError(f"{labels_path} holds the label {int(labels.max())}; labels go to {len(classes) - 1}")
    return TensorImages(images[:, None], labels)


def _read_cifar10(root: Path, size: int) -> Parts:
    # The batches are pickles. torchvision compares their md5 sums with its own list before it unpickles one.
    from torchvision.datasets import CIFAR10

    def fetch(folder: Path) -> None:
        archive = root / CIFAR10.filename
        if archive.is_file():  # downloaded but not yet unpacked; torchvision takes it if its md5 is right
            shutil.copy(archive, folder)
        CIFAR10(folder, download=True)

    names = [file for file, _ in (*CIFAR10.train_list, *CIFAR10.test_list)] + [CIFAR10.meta["filename"]]
    paths = [f"{CIFAR10.base_folder}/{file}" for file in names]
    fetch_files("cifar10", root, [path for path in paths if not (root / path).is_file()], fetch)
    try:
        train, test = (CIFAR10(root, train=part) for part in (True, False))
    except RuntimeError as error:
        raise InputError(
            f"cifar10: a file in {root / CIFAR10.base_folder} is damaged (wrong md5 sum); delete that folder "
            f"to have it downloaded again"
        ) from error
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)]
    targets = [torch.tensor(part.targets) for part in (train, test)]
    return Parts(tuple(train.classes), TensorImages(images[0], targets[0]), TensorImages(images[1], targets[1]))


def _read_imagefolder(root: Path, size: int) -> Parts:
    require_folder(root)
    return read_folders(root, size)


Reader = Callable[[Path, int], Parts]


def _with_decoy(read: Reader) -> Reader:
    """The reader of a dataset whose images carry decoy patches, drawn before any is held out or left out."""

    def read_decoy(root: Path, size: int) -> Parts:
        check_size(size)
        parts = _with_test(read(root, NATIVE_SIZE))
        return with_patches(parts)

    return read_decoy


@dataclass(frozen=True)
class DatasetSpec:
    """How a dataset is read, and what is known of it; mean and std per channel are of images in [0, 1]."""

    read: Reader
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    on_disk: bool = True
    downloads: bool = False
    foreground: bool = False
    """Whether the background is black, so that bright pixels are what an image shows."""


# Mean and std of digits: measured on its training part (before validation is held out) at 28×28. MNIST and
# Fashion-MNIST as in the paper; CIFAR-10's and, for image folders, ImageNet's are the customary ones.
DATASETS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec(_read_digits, 1, 28, (0.3058,), (0.3246,), on_disk=False, foreground=True),
    "mnist": DatasetSpec(_read_mnist, 1, 28, (0.1307,), (0.3081,), downloads=True, foreground=True),
    "fashion_mnist": DatasetSpec(_read_fashion_mnist, 1, 28, (0.2860,), (0.3530,), downloads=True, foreground=True),
    "cifar10": DatasetSpec(_read_cifar10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), downloads=True),
    "imagefolder": DatasetSpec(_read_imagefolder, 3, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
DATASETS |= {
    f"decoy_{name}": replace(DATASETS[name], read=_with_decoy(DATASETS[name].read))
    for name in ("digits", "mnist", "fashion_mnist")
}
