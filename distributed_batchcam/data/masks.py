"""Where in an image an explanation should lie, or should not: masks for the images of a batch."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from distributed_batchcam.errors import InputError, OneRankError

from .decoys import patch_shares
from .folders import images_below
from .image_files import is_image_name, read_square
from .images import FileImages, ImageSet, TensorImages
from .loader import Batch
from .prototype_files import paths_by_class

Masks = Callable[[Batch], Tensor]
"""A batch's masks (n, s, s), bool, on the device of its images: true inside."""

FOREGROUND = 0.1  # grey value above which a pixel is foreground: dark clothes and the edges of strokes are
_READING_THREADS = 16


def foreground(images: ImageSet, threshold: float = FOREGROUND) -> Masks:
    """Pixels whose value, averaged over channels, is above `threshold`; never those of a decoy's patch.

    This takes the background for black, as it is in MNIST and its family. An image without a brighter pixel has an
    empty mask.

    Args:
        images: the image set that the batches come from.
        threshold: from 0 to below 1, as the images are before normalisation.

    Raises:
        InputError: a threshold outside that.
    """
    if not 0 <= threshold < 1:
        raise InputError(f"the threshold of the foreground must be from 0 to below 1, got {threshold}")
    corners = images.corners

    def masks(batch: Batch) -> Tensor:
        bright = batch.images.mean(1) > threshold
        return bright if corners is None else bright & (_shares_in(corners, batch) == 0)

    return masks


def patches(images: ImageSet) -> Masks:
    """The patch of each image of a decoy data set: pixels that are the patch's by half at least.

    Args:
        images: the image set that the batches come from.

    Raises:
        InputError: images without patches.
    """
    corners = images.corners
    if corners is None:
        raise InputError("these images carry no patches; the data sets named decoy_… do")
    return lambda batch: _shares_in(corners, batch) >= 0.5


def _shares_in(corners: Tensor, batch: Batch) -> Tensor:
    """(n, s, s): how much of each pixel is the patch's."""
    device = batch.images.device
    return _shares(batch.images.shape[-1], device)[corners[batch.indices].to(device, non_blocking=True)]


@cache
def _shares(size: int, device: torch.device) -> Tensor:
    return patch_shares(size).to(device)


def load_masks(folder: str | Path, images: ImageSet, classes: Sequence[str]) -> Masks:
    """Masks that the user drew, from a folder: one per class, or one per image.

    One per class, if there are image files in the folder itself: named by class, as `load_prototypes` says.
    One per image, for images that come from files: at the same place below the folder as the image is below the
    folder of its part, under the same name with any extension, `cat/3.png` for ROOT/test/cat/3.jpg (or ROOT/cat/3.jpg
    where ROOT has no parts). They must have the proportions of their images, and are read at once where the images are
    in memory, otherwise batch by batch.

    Inside is what is brighter than half, after the colours are averaged and the mask is cropped and resized just as
    images are (`read_square`); what is transparent is outside.

    Args:
        folder: the folder; hidden files and files that are not images are passed over, as are masks of no image.
        images: the image set that the batches come from.
        classes: names of the C classes, in the order of the targets.

    Raises:
        InputError: a missing folder; a class or an image without a mask, or with several; a class's mask of no class.
            Of a file that cannot be read or has nothing inside: when it is read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; name the one with the masks")
    files = images if isinstance(images, FileImages) else images.files if isinstance(images, TensorImages) else None
    per_class = any(is_image_name(path.name) and path.is_file() for path in folder.iterdir())
    if per_class or files is None:
        return _masks_of_classes(paths_by_class(folder, classes, "mask"), images.shape[-1])
    paths = _paths_by_image(folder, files, classes)
    return (_masks_of_images if files is images else _masks_in_memory)(paths, images.shape[-1])


def _masks_of_classes(paths: dict[str, Path], size: int) -> Masks:
    drawn = torch.stack([_read_mask(path, size) for path in paths.values()])

    @cache
    def on(device: torch.device) -> Tensor:
        return drawn.to(device)

    return lambda batch: on(batch.images.device)[batch.targets]


def _masks_of_images(paths: Sequence[Path], size: int) -> Masks:
    def masks(batch: Batch) -> Tensor:
        try:
            drawn = _read_masks([paths[index] for index in batch.indices.tolist()], size)
        except InputError as error:
            raise OneRankError(str(error)) from None
        return drawn.to(batch.images.device)

    return masks


def _masks_in_memory(paths: Sequence[Path], size: int) -> Masks:
    drawn = _read_masks(paths, size, progress=True)
    return lambda batch: drawn[batch.indices].to(batch.images.device, non_blocking=True)


def _read_masks(paths: Sequence[Path], size: int, *, progress: bool = False) -> Tensor:
    drawn = torch.empty(len(paths), size, size, dtype=torch.bool)
    with ThreadPoolExecutor(_READING_THREADS) as pool:
        read = pool.map(_read_mask, paths, [size] * len(paths))
        bar = tqdm(read, total=len(paths), desc="reading masks", unit=" masks", disable=None if progress else True)
        for place, mask in enumerate(bar):
            drawn[place] = mask
    return drawn


def _paths_by_image(folder: Path, images: FileImages, classes: Sequence[str]) -> list[Path]:
    """The mask of each image, found by its place below the folder, without the extension."""
    found: dict[Path, Path] = {}
    for name in classes:
        for path in images_below(folder / name):
            place = path.relative_to(folder).with_suffix("")
            if place in found:
                raise InputError(f"{found[place]} and {path.name} would be masks of one image; keep one")
            found[place] = path
    places = [path.relative_to(images.root).with_suffix("") for path in images.paths]
    if missing := [place for place in places if place not in found]:
        raise InputError(
            f"{folder} holds no mask of {len(missing)} of {len(places)} images; the first would be {missing[0]}.png "
            f"(or draw one per class, {classes[0]}.png and so on)"
        )
    owners: dict[Path, Path] = {}
    for place, path in zip(places, images.paths, strict=True):
        if place in owners:
            raise InputError(f"images {owners[place]} and {path.name} would share the mask {place}; rename one")
        owners[place] = path
    return [found[place] for place in places]


def _read_mask(path: Path, size: int) -> Tensor:
    inside = read_square(path, size, background="black").float().mean(0) > 127.5
    if not inside.any():
        raise InputError(f"mask {path} is empty: nothing in it is brighter than half; draw what is inside in white")
    return inside
