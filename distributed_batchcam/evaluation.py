"""Accuracy and explanation quality of a model on an image set, exact over ranks.

Every rank writes the figures of its own images into a table over the whole set; one all-reduce joins the tables,
whoever had which image. What is measured stands in `measures`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .cam import channel_weights, normalize_maps, weighted_activations
from .class_sums import ClassSums, cams_of_sums
from .collectives import world_size
from .data import Loader
from .distances import resize_maps, ssim
from .explainer import Explainer, frozen
from .measures import BASIC, FIGURES, ExplainedBatch, Measure
from .metrics.classification import Calibration, calibration, confusion_matrix
from .metrics.maps import consistency, unit_maps


@dataclass(frozen=True)
class Evaluation:
    """Figures over an image set of N images; all tensors on the CPU."""

    targets: Tensor  # (N,)
    per_image: dict[str, Tensor]  # (N,) float64 each
    prototypes: Tensor  # (C, h, w)
    class_maps: Tensor  # (C, h, w) M̄_c over all images of class c, at the prototypes' size
    right_maps: Tensor  # (C, h, w) over the images of class c that were classified correctly
    wrong_maps: Tensor  # (C, h, w) over those that were not
    consistencies: Tensor  # (C,)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def accuracy(self) -> float:
        """Percent."""
        return float(self.per_image["accuracy"].mean())

    @property
    def predicted(self) -> Tensor:
        """(N,) int64"""
        return self.per_image["predicted"].long()

    @property
    def right(self) -> Tensor:
        """(N,) bool: whether each prediction is right."""
        return self.predicted == self.targets

    @cached_property
    def class_similarities(self) -> Tensor:
        """(C,) SSIM(M̄_c, P_c), NaN for classes without an image."""
        return self.similarities(self.class_maps, self.class_counts())

    def similarities(self, maps: Tensor, counts: Tensor) -> Tensor:
        """(C,) SSIM of maps (C, h, w) and the prototypes, NaN where a count (C,) is 0."""
        return ssim(maps, self.prototypes).masked_fill(counts == 0, torch.nan)

    def class_counts(self, which: Tensor | None = None) -> Tensor:
        """(C,) images per class, of those that `which` (N,) bool names."""
        targets = self.targets if which is None else self.targets[which]
        return torch.bincount(targets, minlength=len(self.prototypes))

    def class_rows(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Class maps (C, h, w) of all images, the right and the wrong ones, each with its counts (C,)."""
        return {
            "all": (self.class_maps, self.class_counts()),
            "right": (self.right_maps, self.class_counts(self.right)),
            "wrong": (self.wrong_maps, self.class_counts(~self.right)),
        }

    def calibration(self) -> Calibration:
        """Predictions by confidence."""
        return calibration(self.per_image["confidence"], self.right)

    def confusion(self) -> Tensor:
        """(C, C), rows are targets."""
        return confusion_matrix(self.targets, self.predicted, len(self.prototypes))

    def figures(self) -> dict[str, float | None]:
        """Every figure of `FIGURES` that was measured, by name; None where no image defines it."""
        found = {name: float(values.nanmean()) for name, values in self.per_image.items() if name in FIGURES}
        # A loss that is no number is the model's doing: not a figure that is undefined, to be passed over.
        found["loss"] = float(self.per_image["loss"].mean())
        found["ece"] = 100 * self.calibration().error
        found["class_cam_ssim"] = float(self.class_similarities.nanmean())
        found["class_consistency"] = float(self.consistencies.nanmean())
        found["constant_maps"] = int(self.per_image["constant_maps"].sum())
        return _in_order(found)

    def figures_by_class(self) -> list[dict[str, float | None]]:
        """Per class: `samples`, and the figures that are means over images or belong to classes."""
        rows = []
        for index in range(len(self.prototypes)):
            chosen = self.targets == index
            row = {name: float(values[chosen].nanmean()) for name, values in self.per_image.items() if name in FIGURES}
            row["constant_maps"] = int(self.per_image["constant_maps"][chosen].sum())
            row["class_cam_ssim"] = float(self.class_similarities[index])
            row["class_consistency"] = float(self.consistencies[index])
            rows.append({"samples": int(chosen.sum()), **_in_order(row)})
        return rows

    def confident_mistakes(self, most: int) -> Tensor:
        """Positions (m,), m ≤ `most`, of wrong predictions, the most confident first."""
        wrong = (~self.right).nonzero()[:, 0]
        return wrong[self.per_image["confidence"][wrong].argsort(descending=True, stable=True)[:most]]


def _progress_bar(loader: Loader, shown: bool) -> "tqdm[Any]":
    return tqdm(
        total=len(loader.images),
        desc="evaluating",
        unit=" images",
        # None: quiet where there is no terminal.
        disable=None if shown and loader.rank == 0 else True,
        dynamic_ncols=True,
        leave=False,
    )


def _in_order(found: dict[str, float]) -> dict[str, float | None]:
    """In the order of `FIGURES`; None for what is not a number."""
    return {name: found[name] if math.isfinite(found[name]) else None for name in FIGURES if name in found}


def evaluate(
    explainer: Explainer,
    loader: Loader,
    prototypes: Tensor,
    measures: Sequence[Measure] = BASIC,
    *,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a model in one pass: every image counts once, whatever the number of ranks.

    Args:
        explainer: the model; its weights and mode are restored.
        loader: of the image set, without shuffling, this rank's share.
        prototypes: (C, h, w) on the model's device.
        measures: what to measure beside the class maps, `predictions` and `closeness` among them.
        progress: show it, where there is a terminal.
    """
    classes, size = len(prototypes), (prototypes.shape[1], prototypes.shape[2])
    table: dict[str, Tensor] = {}
    sums: _Sums | None = None
    with frozen(explainer.model), _progress_bar(loader, progress) as bar:
        for batch in loader.epoch():
            output = explainer(batch.images)
            weights = channel_weights(output.logits, output.features, batch.targets, alpha=output.alpha, validate=False)
            features = output.features.detach()
            maps = resize_maps(normalize_maps(weighted_activations(weights, features).relu()), size)
            explained = ExplainedBatch(explainer, batch, output, maps, prototypes)
            places = batch.indices.to(prototypes.device, non_blocking=True)
            for measure in measures:
                for name, values in measure(explained).items():
                    if name not in table:
                        table[name] = torch.zeros(len(loader.images), dtype=torch.float64, device=prototypes.device)
                    table[name].index_copy_(0, places, values.double())
            if sums is None:
                sums = _Sums.zeros(classes, features, maps)
            right = output.logits.detach().argmax(1) == batch.targets
            sums.add(batch.targets, right, weights, features, maps)
            bar.update(batch.batch_size)
    assert sums is not None, "a loader yields every global batch on every rank"
    _sum_over_ranks([*table.values(), *sums])
    return _evaluation(loader.images.targets, table, sums, prototypes)


class _Sums(NamedTuple):
    """What class maps and their consistency are made of; of class c right at c, wrong at C + c."""

    counts: Tensor  # (2C,)
    weights: Tensor  # (2C, K)
    features: Tensor  # (2C, K, H, W)
    maps: Tensor  # (C, h, w) sums of unit maps
    nonzero: Tensor  # (C,)

    @classmethod
    def zeros(cls, classes: int, features: Tensor, maps: Tensor) -> "_Sums":
        """In float64: over a whole set, float32 would show its rounding."""
        shape = features.shape[1:]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=features.device)

        twice = 2 * classes
        return cls(
            zeros(twice), zeros(twice, shape[0]), zeros(twice, *shape), zeros(classes, *maps.shape[1:]), zeros(classes)
        )

    def add(self, targets: Tensor, right: Tensor, weights: Tensor, features: Tensor, maps: Tensor) -> None:
        groups = torch.where(right, targets, targets + len(self.nonzero))
        self.counts.index_add_(0, groups, self.counts.new_ones(len(groups)))
        self.weights.index_add_(0, groups, weights.double())
        self.features.index_add_(0, groups, features.double())
        self.maps.index_add_(0, targets, unit_maps(maps).double())
        self.nonzero.index_add_(0, targets, (maps.amax((1, 2)) > 0).double())


def _sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Each tensor replaced by its sum over the ranks, in one collective."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def _evaluation(targets: Tensor, table: dict[str, Tensor], sums: _Sums, prototypes: Tensor) -> Evaluation:
    classes, size = len(prototypes), (prototypes.shape[1], prototypes.shape[2])
    right, wrong = (ClassSums(*(part[half] for part in sums[:3])) for half in (slice(classes), slice(classes, None)))
    both = ClassSums(*(a + b for a, b in zip(right, wrong, strict=True)))
    all_maps, right_maps, wrong_maps = (
        resize_maps(normalize_maps(cams_of_sums(part).maps), size).float().cpu() for part in (both, right, wrong)
    )
    return Evaluation(
        targets=targets,
        per_image={name: values.cpu() for name, values in table.items()},
        prototypes=prototypes.float().cpu(),
        class_maps=all_maps,
        right_maps=right_maps,
        wrong_maps=wrong_maps,
        consistencies=consistency(sums.maps, sums.nonzero, both.counts).cpu(),
    )
