"""Class prototypes: what each class's explanation should look like."""

import torch
from torch import Tensor

from .cam import normalize_maps
from .checks import check_targets


class PrototypeSums:
    """Accumulates class prototypes over batches, in float64, for sets that do not fit in memory."""

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.float64)
        self.sums: Tensor | None = None

    def add(self, images: Tensor, targets: Tensor) -> None:
        """Add a batch: images (N, 1 or 3, h, w) in [0, 1], targets (N,)."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must have shape (N, 1 or 3, h, w), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}")
        check_targets(targets, len(images), len(self.counts))
        if self.sums is None:
            self.sums = torch.zeros(len(self.counts), *images.shape[2:], dtype=torch.float64, device=images.device)
            self.counts = self.counts.to(images.device)
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError("images must lie in [0, 1] and be finite: take them before normalisation")
        gray = images.double().mean(1)
        targets = targets.to(images.device).long()
        self.sums.index_add_(0, targets, gray)
        self.counts += torch.bincount(targets, minlength=len(self.counts))

    def prototypes(self, *, normalize: bool = True) -> Tensor:
        """(C, h, w) in float64: P_c = mean of the images of class c, min-max scaled to [0, 1]."""
        missing = torch.nonzero(self.counts == 0).flatten().tolist()
        if self.sums is None or missing:
            raise ValueError(f"no image of class {', '.join(map(str, missing))}: a prototype needs at least one")
        means = self.sums / self.counts[:, None, None]
        return normalize_maps(means) if normalize else means


def compute_prototypes(images: Tensor, targets: Tensor, num_classes: int, *, normalize: bool = True) -> Tensor:
    """Average image of each class (Batch-CAM paper, section 3: prototypes).

    P_c = 1/N_c Σ_{i: y_i = c} mean over channels of image_i, then min-max scaled to [0, 1], as CAMs are.

    Args:
        images: (N, 1 or 3, h, w) in [0, 1], before normalisation.
        targets: (N,) classes.
        num_classes: C.
        normalize: min-max scale each prototype.

    Returns:
        (C, h, w) in [0, 1], of the images' dtype.

    Raises:
        ValueError: wrong shapes, values outside [0, 1], or a class without an image.
    """
    sums = PrototypeSums(num_classes)
    sums.add(images, targets)
    return sums.prototypes(normalize=normalize).to(images.dtype)
