"""What is measured of explained images: a measure is a function from a batch to figures per image, by name.

To add one: write the function, describe its figures in `FIGURES`, and name it in `map_measures` or `every_measure`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import DATASETS, FOREGROUND, Batch, ImageSet, Masks, foreground, patches
from .distances import l1_distance, ssim
from .explainer import Explainer, maps_of
from .metrics.maps import gini, relevance_mass, relevance_rank
from .metrics.perturbation import confidence_change, deletion_insertion, sensitivity
from .models import CAMOutput

PATCH = "patch"  # prefix of the figures of a decoy data set
NOISE_RADIUS = 0.05  # of sensitivity, in units of the images' range [0, 1]
NOISE_DRAWS = 10
CURVE_STEPS = 20  # of deletion and insertion


class FigureInfo(NamedTuple):
    """What a figure means, in a line."""

    title: str
    better: Literal["higher", "lower", ""]
    description: str
    source: str = ""
    independent: bool = True  # False: what the objectives optimise, hence no evidence of right reasons


FIGURES: dict[str, FigureInfo] = {
    "accuracy": FigureInfo("Accuracy", "higher", "images whose class has the highest logit, in percent"),
    "top5_accuracy": FigureInfo(
        "Top-5 accuracy", "higher", "images whose class is among the five highest logits, in percent"
    ),
    "loss": FigureInfo("Cross-entropy", "lower", "mean of -log p of the right class"),
    "ece": FigureInfo(
        "Calibration error",
        "lower",
        "expected gap between confidence and accuracy over 15 bins of confidence, in percent",
        "Guo et al. 2017, eq. 3",
    ),
    "cam_l1": FigureInfo(
        "CAM L1",
        "lower",
        "mean |map - prototype| of each image's map and its class's prototype",
        "Batch-CAM paper, eq. 10",
        independent=False,
    ),
    "cam_ssim": FigureInfo(
        "CAM SSIM",
        "higher",
        "structural similarity of each image's map and its class's prototype",
        "Batch-CAM paper, eq. 6-10",
        independent=False,
    ),
    "class_cam_ssim": FigureInfo(
        "Class CAM SSIM",
        "higher",
        "structural similarity of each class's map over the whole set and its prototype, mean over classes",
        "Batch-CAM paper, eq. 3-9",
        independent=False,
    ),
    "relevance_mass": FigureInfo(
        "Relevance mass", "higher", "share of a map's relevance that lies inside the mask", "Arras et al. 2022"
    ),
    "relevance_rank": FigureInfo(
        "Relevance rank",
        "higher",
        "share of a map's K most relevant pixels that lie inside the mask of K pixels",
        "Arras et al. 2022",
    ),
    "patch_mass": FigureInfo(
        "Decoy mass",
        "lower",
        "share of the relevance of the predicted class's map that lies on the decoy's patch",
        "Arras et al. 2022",
    ),
    "patch_rank": FigureInfo(
        "Decoy rank",
        "lower",
        "share of the K most relevant pixels of the predicted class's map that lie on the decoy's patch of K pixels",
        "Arras et al. 2022",
    ),
    "sparseness": FigureInfo(
        "Sparseness",
        "",
        "Gini index of a map's relevance: 0 spread evenly, towards 1 on few pixels",
        "Chalasani et al. 2020",
    ),
    "average_drop": FigureInfo(
        "Average drop",
        "lower",
        "how much of the class's probability is lost when the image is darkened by its map, in percent",
        "Chattopadhay et al. 2018",
    ),
    "average_increase": FigureInfo(
        "Average increase",
        "higher",
        "images whose class becomes more probable when darkened by their map, in percent",
        "Chattopadhay et al. 2018",
    ),
    "sensitivity": FigureInfo(
        "Sensitivity",
        "lower",
        f"relative change of the map under uniform noise of ±{NOISE_RADIUS} of the images' range",
        "Yeh et al. 2019, Bhatt et al. 2020",
    ),
    "random_logit_ssim": FigureInfo(
        "Random logit SSIM",
        "lower",
        "structural similarity of the map and that of another class, drawn at random: low if maps tell classes apart",
        "Sixt et al. 2020",
    ),
    "deletion_auc": FigureInfo(
        "Deletion AUC",
        "lower",
        "mean probability of the class while the most relevant pixels are blackened first",
        "Petsiuk et al. 2018",
    ),
    "insertion_auc": FigureInfo(
        "Insertion AUC",
        "higher",
        "mean probability of the class while the most relevant pixels are put first into a black image",
        "Petsiuk et al. 2018",
    ),
    "class_consistency": FigureInfo(
        "Consistency",
        "higher",
        "mean cosine similarity of the maps of two images of a class, mean over classes",
    ),
    "constant_maps": FigureInfo(
        "Constant maps", "lower", "number of images whose map is the same everywhere: no explanation at all"
    ),
}
"""Every figure by name; maps are of the target class, but where the figure says otherwise."""


@dataclass(frozen=True)
class ExplainedBatch:
    """One rank's share of a batch as measures see it; it may be empty."""

    explainer: Explainer
    batch: Batch
    output: CAMOutput
    maps: Tensor  # (n, h, w) of the target class, at the prototypes' size
    prototypes: Tensor  # (C, h, w)

    @property
    def images(self) -> Tensor:
        """(n, ch, h, w) in [0, 1]"""
        return self.batch.images

    @property
    def targets(self) -> Tensor:
        """(n,)"""
        return self.batch.targets

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the maps"""
        return self.maps.shape[1], self.maps.shape[2]

    @cached_property
    def predicted_maps(self) -> Tensor:
        """(n, h, w) of the predicted class."""
        return maps_of(self.output, None, self.size)

    @cached_property
    def probabilities(self) -> Tensor:
        """(n, C)"""
        return self.output.logits.detach().softmax(1)

    @cached_property
    def target_probabilities(self) -> Tensor:
        """(n,)"""
        return self.probabilities.gather(1, self.targets[:, None])[:, 0]


Measure = Callable[[ExplainedBatch], dict[str, Tensor]]
"""Figures (n,) per image, by name; NaN where a figure is not defined."""


# Measures ------------------------------------------------------------------------------------------------


def predictions(batch: ExplainedBatch) -> dict[str, Tensor]:
    """Predicted class, its probability, and whether it is right."""
    logits, targets = batch.output.logits.detach(), batch.targets
    confidence, predicted = batch.probabilities.max(1)
    figures = {
        "predicted": predicted,
        "confidence": confidence,
        "accuracy": 100 * (predicted == targets),
        "loss": F.cross_entropy(logits, targets, reduction="none"),
    }
    if logits.shape[1] > 5:
        figures["top5_accuracy"] = 100 * (logits.topk(5).indices == targets[:, None]).any(1)
    return figures


def closeness(batch: ExplainedBatch) -> dict[str, Tensor]:
    """Distance of each map to its class's prototype, and whether the map is constant."""
    prototypes = batch.prototypes[batch.targets]
    return {
        "cam_l1": l1_distance(batch.maps, prototypes),
        "cam_ssim": ssim(batch.maps, prototypes),
        "constant_maps": batch.maps.amax((1, 2)) == 0,
    }


def sparseness(batch: ExplainedBatch) -> dict[str, Tensor]:
    """Gini index of each map."""
    return {"sparseness": gini(batch.maps)}


@dataclass(frozen=True)
class Localization:
    """Relevance inside masks; figures are called `prefix`_mass and `prefix`_rank."""

    prefix: str
    masks: Masks

    def __call__(self, batch: ExplainedBatch) -> dict[str, Tensor]:
        masks = self.masks(batch.batch)
        # A patch that misleads speaks for the class that was predicted; the target's map would not show it.
        maps = batch.predicted_maps if self.prefix == PATCH else batch.maps
        return {
            f"{self.prefix}_mass": relevance_mass(maps, masks),
            f"{self.prefix}_rank": relevance_rank(maps, masks),
        }


class RandomLogit:
    """Similarity of each map to the map of another class (random logit test; Sixt et al. 2020)."""

    def __init__(self, samples: int, num_classes: int) -> None:
        # Drawn for the whole set at once: the same for every number of ranks.
        generator = torch.Generator().manual_seed(0)
        self.shifts = torch.randint(1, max(num_classes, 2), (samples,), generator=generator)
        self.num_classes = num_classes

    def __call__(self, batch: ExplainedBatch) -> dict[str, Tensor]:
        shifts = self.shifts[batch.batch.indices].to(batch.targets.device, non_blocking=True)
        others = maps_of(batch.output, (batch.targets + shifts) % self.num_classes, batch.size)
        return {"random_logit_ssim": ssim(batch.maps, others)}


def confidence(batch: ExplainedBatch) -> dict[str, Tensor]:
    """Average drop and increase in confidence, in percent."""
    drop, increase = confidence_change(
        batch.explainer.probabilities, batch.images, batch.maps, batch.targets, batch.target_probabilities
    )
    return {"average_drop": 100 * drop, "average_increase": 100 * increase}


@dataclass(frozen=True)
class OnSubset:
    """A measure that is too costly for every image, on some: `members` (N,) bool on the CPU."""

    members: Tensor
    measure: Callable[[ExplainedBatch, Tensor], dict[str, Tensor]]

    def __call__(self, batch: ExplainedBatch) -> dict[str, Tensor]:
        chosen = self.members[batch.batch.indices].nonzero()[:, 0]
        on_device = chosen.to(batch.targets.device, non_blocking=True)
        return {
            name: torch.full_like(batch.maps[:, 0, 0], torch.nan).index_copy_(0, on_device, values)
            for name, values in self.measure(batch, chosen).items()
        }


def curves(batch: ExplainedBatch, chosen: Tensor) -> dict[str, Tensor]:
    """Areas under the deletion and insertion curves of the images at `chosen`."""
    rows = chosen.to(batch.targets.device, non_blocking=True)
    deletion, insertion = deletion_insertion(
        batch.explainer.probabilities, batch.images[rows], batch.maps[rows], batch.targets[rows], CURVE_STEPS
    )
    return {"deletion_auc": deletion, "insertion_auc": insertion}


def noise_sensitivity(batch: ExplainedBatch, chosen: Tensor) -> dict[str, Tensor]:
    """Average sensitivity of the images at `chosen`."""
    rows = chosen.to(batch.targets.device, non_blocking=True)
    images = batch.images[rows]
    changes = sensitivity(
        lambda x, classes: batch.explainer.maps(x, classes, batch.size),
        images,
        batch.maps[rows],
        batch.targets[rows],
        (_noise(batch.batch.indices[chosen], draw, images) for draw in range(NOISE_DRAWS)),
        NOISE_RADIUS,
    )
    return {"sensitivity": changes}


def _noise(indices: Tensor, draw: int, like: Tensor) -> Tensor:
    """Uniform in [-1, 1], by position in the set: the same for every batch size and number of ranks."""
    noise = torch.empty(like.shape)
    for row, index in zip(noise, indices.tolist(), strict=True):
        row.uniform_(-1, 1, generator=torch.Generator().manual_seed(index * NOISE_DRAWS + draw))
    return noise.to(like)


BASIC: tuple[Measure, ...] = (predictions, closeness)
"""One forward pass and little more: what training looks at after every epoch."""


def default_masks(dataset: str, images: ImageSet, threshold: float = FOREGROUND) -> dict[str, Masks]:
    """What relevance is measured against where the user says nothing, by the prefix of the figures.

    `relevance`: the foreground, for data sets with a black background; `patch`: the patch of a decoy data set.
    """
    masks = {"relevance": foreground(images, threshold)} if DATASETS[dataset].foreground else {}
    if images.corners is not None:
        masks[PATCH] = patches(images)
    return masks


def map_measures(samples: int, num_classes: int, masks: Mapping[str, Masks]) -> list[Measure]:
    """All measures that need no further forward pass; `masks` by the prefix of their figures."""
    measures: list[Measure] = [*BASIC, sparseness]
    measures += [Localization(prefix, source) for prefix, source in masks.items()]
    if num_classes > 1:
        measures.append(RandomLogit(samples, num_classes))
    return measures


def every_measure(samples: int, num_classes: int, masks: Mapping[str, Masks], subset: Tensor) -> list[Measure]:
    """All measures; the costly ones on the images at `subset` (n,)."""
    members = torch.zeros(samples, dtype=torch.bool)
    members[subset] = True
    return [
        *map_measures(samples, num_classes, masks),
        confidence,
        OnSubset(members, curves),
        OnSubset(members, noise_sensitivity),
    ]
