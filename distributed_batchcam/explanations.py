"""Explanations of single images: what a model predicts for each, and the maps that say why."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .distances import resize_maps, ssim_to_each
from .explainer import Explainer, frozen, maps_of

_VALUES_AT_A_TIME = 1 << 20  # compared with prototypes at a time: few enough for the processor's caches


@dataclass(frozen=True)
class Explanations:
    """N explained images; all tensors on the CPU. Maps are Grad-CAMs in [0, 1] at the target layer's size (H, W)."""

    classes: tuple[str, ...]
    images: Tensor  # (N, ch, s, s) in [0, 1], as the model saw them
    targets: Tensor | None  # (N,)
    probabilities: Tensor  # (N, C)
    predicted_maps: Tensor  # (N, H, W) of the predicted class
    target_maps: Tensor | None  # (N, H, W) of the target class
    l1: Tensor  # (N, C) mean |map of the predicted class - prototype of each class|
    ssim: Tensor  # (N, C) structural similarity of the same
    names: tuple[str, ...]  # N, for people and files
    sources: tuple[Path | None, ...]  # N, the files that the images come from

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def predicted(self) -> Tensor:
        """(N,) predicted class."""
        return self.probabilities.argmax(1)

    @cached_property
    def confidence(self) -> Tensor:
        """(N,) probability of the predicted class."""
        return self.probabilities.amax(1)

    @cached_property
    def constant(self) -> Tensor:
        """(N,) bool: whether the predicted class's map is the same everywhere, and so explains nothing."""
        return self.predicted_maps.amax((1, 2)) == 0


def explain_images(
    explainer: Explainer,
    images: Tensor,
    targets: Tensor | None,
    prototypes: Tensor,
    classes: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    sources: Sequence[Path | None] | None = None,
    batch_size: int = 512,
) -> Explanations:
    """Explain images (N, ch, s, s) in [0, 1]; N may be 0.

    Args:
        explainer: the model.
        images: on any device.
        targets: (N,) target classes, None if not known.
        prototypes: (C, h, w) on the model's device.
        classes: C names.
        names: N names of the images; None: their numbers.
        sources: N files that they come from, None for those that come from none.
        batch_size: images at a time.
    """
    parts: list[tuple[Tensor, ...]] = []
    with frozen(explainer.model):
        for start in range(0, max(len(images), 1), batch_size):
            chosen = slice(start, start + batch_size)
            output = explainer(images[chosen].to(prototypes.device))
            predicted = maps_of(output, None)
            of_target = predicted
            if targets is not None:
                of_target = maps_of(output, targets[chosen].to(prototypes.device))
            probabilities = output.logits.detach().softmax(1)
            part = (probabilities, predicted, of_target, *_distances(predicted, prototypes))
            parts.append(tuple(tensor.cpu() for tensor in part))
    probabilities, predicted, of_target, l1, similarity = (torch.cat(column) for column in zip(*parts, strict=True))
    return Explanations(
        classes=tuple(classes),
        images=images.cpu(),
        targets=None if targets is None else targets.cpu(),
        probabilities=probabilities,
        predicted_maps=predicted,
        target_maps=None if targets is None else of_target,
        l1=l1,
        ssim=similarity,
        names=tuple(map(str, range(len(images))) if names is None else names),
        sources=(None,) * len(images) if sources is None else tuple(sources),
    )


def _distances(maps: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and SSIM, each (n, C), of every map (n, H, W) and every prototype (C, h, w)."""
    size = (prototypes.shape[1], prototypes.shape[2])
    at_a_time = max(1, _VALUES_AT_A_TIME // prototypes.numel())
    rows = []
    for some in resize_maps(maps, size).split(at_a_time):
        l1 = (some[:, None] - prototypes).abs().mean((2, 3))
        rows.append(torch.stack([l1, ssim_to_each(some, prototypes)]))
    l1, similarity = torch.cat(rows, 1)
    return l1, similarity
