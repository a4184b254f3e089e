"""Decoy data sets: a patch in a corner gives the class away in training, and says nothing in the test.

A model that looks at the patch is right in training, and in validation, for the wrong reason. The protocol is the
decoy MNIST of Ross, Hughes, Doshi-Velez, "Right for the Right Reasons" (IJCAI 2017), which Friedrich, Stammer,
Schramowski, Kersting, "A typology for exploring the mitigation of shortcut behaviour" (2023) build on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_batchcam.errors import InputError

from .images import ImageSet, Parts, TensorImages

NATIVE_SIZE = 28  # of the images that patches are drawn on
PATCH_SIZE = 4

_FIRST, _LAST = slice(PATCH_SIZE), slice(-PATCH_SIZE, None)
CORNERS = ((_FIRST, _FIRST), (_FIRST, _LAST), (_LAST, _FIRST), (_LAST, _LAST))
"""Rows and columns of the patch: top left, top right, bottom left, bottom right."""

_LEAST_SIZE = 6  # below it, no pixel of a resized image shows the patch by half
_STEP = 25  # between the grey values of two classes

# Like the splits, patches belong to the data, not to a run. Not the splits' own seed: the corners would otherwise
# come from the very numbers that choose the images to hold out.
_PATCH_SEED, _OTHER_PATCH_SEED = 1, 2


def with_patches(parts: Parts) -> Parts:
    """The images with a patch of 4×4 pixels flush in a corner, drawn uniformly for each image.

    Its value is 255 - 25·y in training images of class y, and 255 - 25·d in test images, d uniform on the classes
    and independent of theirs. Images that are held out for validation come from the training images and carry
    their patches, so that accuracy on them is as deceptive as on those. Which corner and which d depends on the
    place of an image in the data alone: neither on the run's seed, nor on what is held out or left out.

    Patches are drawn at 28×28, to which other images are resized before. At another image size, image and patch
    are resized together.

    Args:
        parts: training and test images in memory, of at most 11 classes, as 255 - 25·y has no room for more.
    """
    assert parts.test is not None
    assert parts.valid is None, "its patches would have to be those of training"
    generator = torch.Generator().manual_seed(_PATCH_SEED)
    corners = [torch.randint(len(CORNERS), (len(part),), generator=generator) for part in (parts.train, parts.test)]
    decoys = torch.randint(len(parts.classes), (len(parts.test),), generator=generator)
    return parts._replace(
        train=_patched(parts.train, corners[0], parts.train.targets),
        test=_patched(parts.test, corners[1], decoys),
    )


def with_other_patches(images: ImageSet) -> TensorImages:
    """The images with patches as test images have them: of a class that is drawn independently of theirs.

    Of images that were held out of training, a small validation set without the bias of training.
    """
    generator = torch.Generator().manual_seed(_OTHER_PATCH_SEED)
    corners = torch.randint(len(CORNERS), (len(images),), generator=generator)
    decoys = torch.randint(int(images.targets.max()) + 1, (len(images),), generator=generator)
    return _patched(images, corners, decoys)


def _patched(images: ImageSet, corners: Tensor, labels: Tensor) -> TensorImages:
    assert isinstance(images, TensorImages)
    native = images.resized(NATIVE_SIZE)
    values = (255 - _STEP * labels).to(torch.uint8)
    pixels = native.images.clone()
    for corner, (rows, columns) in enumerate(CORNERS):
        here = corners == corner
        pixels[here, :, rows, columns] = values[here, None, None, None]
    return TensorImages(pixels, images.targets, corners=corners)


def patch_shares(size: int) -> Tensor:
    """(4, size, size): how much of a pixel is the patch's, for each corner, in images resized to `size`."""
    shares = torch.zeros(len(CORNERS), 1, NATIVE_SIZE, NATIVE_SIZE)
    for share, (rows, columns) in zip(shares, CORNERS, strict=True):
        share[0, rows, columns] = 1
    return F.interpolate(shares, size=(size, size), mode="bilinear", antialias=True)[:, 0]


def check_size(size: int) -> None:
    """Require an image size at which the patch can still be seen.

    Raises:
        InputError: a smaller one.
    """
    if size < _LEAST_SIZE:
        raise InputError(f"the patch of a decoy data set is lost in {size}×{size} pixels; choose {_LEAST_SIZE} or more")
