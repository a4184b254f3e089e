"""Training objectives: cross-entropy plus a loss on the explanations, or a sum of several, by name.

To add an objective: write a `CAMLoss` (cam_loss.py) and give it a line in `CAM_LOSSES`. Configuration, command
line, trainer and reports pick it up from there.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cam import Alpha, channel_weights, maps_of_weights
from .cam_loss import CAMLoss
from .checks import check_features, check_prototypes, check_targets
from .class_sums import Reduction, check_reduction, class_cams_of_weights, class_weights
from .collectives import global_mean, mean_of_sum
from .distances import DISTANCES, Distance, resize_maps, ssim_distance
from .errors import InputError, unknown_name
from .right_reasons import (
    DEPARTURE,
    SUPPORT,
    Evidence,
    MaskedGradCAMLoss,
    PrototypeDepartureLoss,
    PrototypeSupportLoss,
    RightReasonsLoss,
)

CAMClass = Literal["predicted", "target"]
Resize = Literal["cam", "prototypes"]
Exponents = tuple[float, float, float]


class _LossOfMaps(CAMLoss):
    """A loss in two parts: α, which may differentiate the head, and `of_weights`, what follows from it."""

    of_weights: Callable[..., Tensor]

    def compile_maps(self) -> None:
        """Compile what follows from α, all of it differentiated once; the head, differentiated twice, cannot be."""
        self.of_weights = torch.compile(self.of_weights)


class _PrototypeDistance(_LossOfMaps):
    """Common part of PL and BCPL: the prototypes, and the distance of maps to them."""

    prototypes: Tensor

    def __init__(
        self, prototypes: Tensor, distance: str, resize: Resize, ssim_exponents: Exponents, validate: bool
    ) -> None:
        super().__init__()
        check_prototypes(prototypes)
        if distance not in DISTANCES:
            raise unknown_name("distance", distance, DISTANCES)
        if resize not in get_args(Resize):
            raise ValueError(f"resize must be one of {', '.join(get_args(Resize))}, got {resize!r}")
        if len(ssim_exponents) != 3 or min(ssim_exponents) < 0:
            raise ValueError(f"ssim_exponents must be three numbers ≥ 0, got {ssim_exponents}")
        self.register_buffer("prototypes", prototypes.detach().clone(), persistent=False)
        self.resize = resize
        self.validate = validate
        self.distance: Distance = DISTANCES[distance]
        if distance == "ssim":
            self.distance = partial(ssim_distance, exponents=ssim_exponents)

    def _check_classes(self, logits: Tensor) -> None:
        if logits.ndim == 2 and logits.shape[1] != len(self.prototypes):
            raise ValueError(f"{len(self.prototypes)} prototypes (C, h, w) for logits of {logits.shape[1]} classes")

    def _distances(self, maps: Tensor, prototypes: Tensor) -> Tensor:
        """(N, H, W) maps against (N, h, w) prototypes, brought to one size: (N,)."""
        prototypes = prototypes.to(maps.dtype)
        with torch.autocast(maps.device.type, enabled=False):
            if self.resize == "cam":
                maps = resize_maps(maps, (prototypes.shape[1], prototypes.shape[2]))
            else:
                prototypes = resize_maps(prototypes, (maps.shape[1], maps.shape[2]))
            return self.distance(maps, prototypes)


class PrototypeLoss(_PrototypeDistance):
    """PL: mean over images of the distance of each Grad-CAM map to its class's prototype (paper, eq. 10).

    PL = 1/N Σ_i d(resize(M_i), P[y_i]).

    Args:
        prototypes: (C, h, w) in [0, 1].
        distance: `l1`, `l2` or `ssim`.
        cam_class: map of the `predicted` class (paper, Algorithm 1) or of the `target` class.
        resize: bring the `cam` to the prototypes' size, or the `prototypes` to the CAM's.
        ssim_exponents: (α, β, γ) of SSIM, paper eq. 6.
        validate: check target values in every call; on a GPU that waits for the device each time.

    Called with `(logits (N, C), features (N, K, H, W), targets (N,))`; returns an unweighted scalar, scaled
    such that DDP's average over ranks is the mean over the global batch.
    """

    def __init__(
        self,
        prototypes: Tensor,
        distance: str = "l1",
        cam_class: CAMClass = "predicted",
        *,
        resize: Resize = "cam",
        ssim_exponents: Exponents = (1.0, 1.0, 1.0),
        validate: bool = True,
    ) -> None:
        super().__init__(prototypes, distance, resize, ssim_exponents, validate)
        if cam_class not in get_args(CAMClass):
            raise ValueError(f"cam_class must be one of {', '.join(get_args(CAMClass))}, got {cam_class!r}")
        self.cam_class = cam_class

    def forward(
        self,
        logits: Tensor,
        features: Tensor,
        targets: Tensor,
        images: Tensor | None = None,
        *,
        alpha: Alpha | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Images are not used; `batch_size` is the size of the global batch, where the caller knows it."""
        self._check_classes(logits)
        check_targets(targets, len(logits), len(self.prototypes), values=self.validate)
        weights = channel_weights(
            logits,
            features,
            targets if self.cam_class == "target" else None,
            create_graph=torch.is_grad_enabled(),
            alpha=alpha,
            validate=False,
        )
        return global_mean(self.of_weights(weights, features, targets), batch_size)

    def of_weights(self, weights: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        """Distances (N,) from α (N, K), A (N, K, H, W) and targets (N,)."""
        return self._distances(maps_of_weights(weights, features), self.prototypes[targets.long()])


class BatchCAMLoss(_PrototypeDistance):
    """BCPL: distance of each class's CAM, over the whole global batch, to its prototype (paper, eq. 3-5, 11).

    BCPL = Σ_{c present} d(resize(M̄_c), P_c): a sum over the classes present in the global batch; an absent
    class adds exactly nothing.

    Args:
        prototypes: (C, h, w) in [0, 1].
        distance: `l1`, `l2` or `ssim`.
        reduction: how the class sums travel between ranks, see `class_sums`.
        resize, ssim_exponents, validate: as for `PrototypeLoss`.

    Called with `(logits (N, C), features (N, K, H, W), targets (N,))` by every rank in every step; returns an
    unweighted scalar, the same on all ranks.
    """

    def __init__(
        self,
        prototypes: Tensor,
        distance: str = "l1",
        reduction: Reduction = "factored",
        *,
        resize: Resize = "cam",
        ssim_exponents: Exponents = (1.0, 1.0, 1.0),
        validate: bool = True,
    ) -> None:
        super().__init__(prototypes, distance, resize, ssim_exponents, validate)
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Tensor,
        features: Tensor,
        targets: Tensor,
        images: Tensor | None = None,
        *,
        alpha: Alpha | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Neither `images` nor `batch_size` is used: the counts of the classes say it all."""
        self._check_classes(logits)
        weights = class_weights(
            logits,
            features,
            targets,
            len(self.prototypes),
            create_graph=torch.is_grad_enabled(),
            alpha=alpha,
            validate=self.validate,
        )
        return self.of_weights(weights, features, targets)

    def of_weights(self, weights: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        """The loss from Σα of each class (C, K), A (N, K, H, W) and targets (N,)."""
        cams = class_cams_of_weights(weights, features, targets, len(self.prototypes), reduction=self.reduction)
        distances = self._distances(cams.maps, self.prototypes)
        return torch.dot(distances, cams.counts.clamp(max=1))


class ContrastiveCAMLoss(_LossOfMaps):
    """Contrastive loss of the predecessor: right predictions should look at the image (paper, eq. 1).

    mean_i [Y_i·D_i² + (1 - Y_i)·max(0, m - D_i)²] with D_i = ‖resize(M_i) - image_i‖₂, Y_i = 1 where the
    prediction is right (the contrastive loss of Hadsell, Chopra and LeCun 2006, eq. 4, without its ½).

    Args:
        margin: m > 0, in units of D: the distance beyond which a wrong prediction's map costs nothing.
        validate: as for `PrototypeLoss`.

    Called with `(logits (N, C), features (N, K, H, W), targets (N,), images (N, 1 or 3, h, w) in [0, 1])`.
    """

    def __init__(self, margin: float = 1.0, *, validate: bool = True) -> None:
        super().__init__()
        if not 0 < margin < float("inf"):
            raise ValueError(f"margin must be a positive number, got {margin}")
        self.margin = margin
        self.validate = validate

    def forward(
        self,
        logits: Tensor,
        features: Tensor,
        targets: Tensor,
        images: Tensor,
        *,
        alpha: Alpha | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        check_features(logits, features)
        check_targets(targets, len(logits), logits.shape[1], values=self.validate)
        if images.ndim != 4 or len(images) != len(logits):
            raise ValueError(f"images must have shape ({len(logits)}, 1 or 3, h, w), got {tuple(images.shape)}")
        weights = channel_weights(logits, features, create_graph=torch.is_grad_enabled(), alpha=alpha)
        right = logits.detach().argmax(1) == targets
        return global_mean(self.of_weights(weights, features, images, right), batch_size)

    def of_weights(self, weights: Tensor, features: Tensor, images: Tensor, right: Tensor) -> Tensor:
        """Losses (N,) from α (N, K), A (N, K, H, W), images (N, 1 or 3, h, w) and `right` Y (N,)."""
        maps = maps_of_weights(weights, features)
        with torch.autocast(maps.device.type, enabled=False):
            gray = images.to(maps.dtype).mean(1)
            maps = resize_maps(maps, (gray.shape[1], gray.shape[2]))
            # Squares first: the root's slope is infinite where map and image coincide.
            squared = (maps - gray).square().sum((1, 2))
            distance = squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()
            return torch.where(right, squared, (self.margin - distance).clamp(min=0).square())


@dataclass(frozen=True)
class CAMLossOptions:
    """Options of the CAM losses; each loss takes those that concern it."""

    cam_class: CAMClass = "predicted"
    reduction: Reduction = "factored"
    resize: Resize = "cam"
    ssim_exponents: Exponents = (1.0, 1.0, 1.0)
    margin: float = 1.0
    support: float = SUPPORT
    departure: float = DEPARTURE
    class_means: Callable[[], Tensor] | None = None
    """The mean training image of each class (C, h, w), unscaled: a pass over the data, for the losses that ask."""


def _prototype_loss(distance: str, prototypes: Tensor, options: CAMLossOptions) -> CAMLoss:
    return PrototypeLoss(
        prototypes,
        distance,
        options.cam_class,
        resize=options.resize,
        ssim_exponents=options.ssim_exponents,
        validate=False,
    )


def _batch_cam_loss(distance: str, prototypes: Tensor, options: CAMLossOptions) -> CAMLoss:
    return BatchCAMLoss(
        prototypes,
        distance,
        options.reduction,
        resize=options.resize,
        ssim_exponents=options.ssim_exponents,
        validate=False,
    )


def _contrastive_loss(prototypes: Tensor, options: CAMLossOptions) -> CAMLoss:
    return ContrastiveCAMLoss(options.margin, validate=False)


def _prototype_support_loss(evidence: Evidence, prototypes: Tensor, options: CAMLossOptions) -> CAMLoss:
    return PrototypeSupportLoss(prototypes, options.support, evidence=evidence, validate=False)


def _prototype_departure_loss(prototypes: Tensor, options: CAMLossOptions) -> CAMLoss:
    if options.class_means is None:
        raise ValueError("pdl compares the prototypes with the training images: give the options their class_means")
    return PrototypeDepartureLoss(prototypes, options.class_means(), options.departure, validate=False)


def _right_reasons_loss(prototypes: Tensor, options: CAMLossOptions) -> CAMLoss:
    return RightReasonsLoss(validate=False)


def _masked_grad_cam_loss(prototypes: Tensor, options: CAMLossOptions) -> CAMLoss:
    return MaskedGradCAMLoss(validate=False)


# The trainer checks the targets once, when the data is loaded: hence validate=False above.
CAM_LOSSES: dict[str, Callable[[Tensor, CAMLossOptions], CAMLoss]] = {
    **{f"pl_{distance}": partial(_prototype_loss, distance) for distance in DISTANCES},
    **{f"bcpl_{distance}": partial(_batch_cam_loss, distance) for distance in DISTANCES},
    "contrastive": _contrastive_loss,
    "psl": partial(_prototype_support_loss, "log_probabilities"),
    "psl_margin": partial(_prototype_support_loss, "margin"),
    "pdl": _prototype_departure_loss,
    "rrr": _right_reasons_loss,
    "rrr_g": _masked_grad_cam_loss,
}
OBJECTIVES = ("baseline", *CAM_LOSSES)


class Term(NamedTuple):
    """One loss of a sum."""

    factor: float
    name: str


def parse_objective(text: str) -> tuple[Term, ...]:
    """The terms of an objective: `bcpl_l1+10psl` is bcpl_l1 and 10 times psl; `baseline` has none.

    Raises:
        InputError: an unknown name, `baseline` in a sum, a factor of 0, or a name that comes twice.
    """
    if text == "baseline":
        return ()
    terms = []
    for part in text.split("+"):
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)?(.*)", part, re.DOTALL)
        assert found is not None
        if found[2] == "baseline":
            raise InputError(f"objective {text!r}: baseline adds nothing, leave it out of the sum")
        if found[2] not in CAM_LOSSES:
            known = f"known: {', '.join(OBJECTIVES)}, and sums such as bcpl_l1+10psl"
            raise unknown_name("objective", found[2], OBJECTIVES, known)
        terms.append(Term(float(found[1] or 1), found[2]))
    if len({term.name for term in terms}) < len(terms) or not all(0 < term.factor < math.inf for term in terms):
        raise InputError(f"objective {text!r} must name each loss once, with a finite factor above 0")
    return tuple(terms)


class LossParts(NamedTuple):
    """Scalars; `total` is what is differentiated, the others are unweighted."""

    total: Tensor
    classification: Tensor
    cam: Tensor


class Objective(nn.Module):
    """λ_class·CE + λ·(loss on the CAMs), by name; `baseline` is the cross-entropy alone (paper, eq. 10-11).

    The loss may be a sum: `bcpl_l1+10psl` is λ·(BCPL + 10·PSL).

    Both parts are scaled for DDP's average over ranks: together the ranks follow the gradient of one
    process on the global batch, for any split of it.

    Args:
        name: one of `OBJECTIVES`, or a sum of them, see `parse_objective`.
        prototypes: (C, h, w) in [0, 1].
        weight: λ.
        class_weight: λ_class.
        label_smoothing: of the cross-entropy.
        options: of the CAM loss.

    Raises:
        InputError: an unknown name.
    """

    def __init__(
        self,
        name: str,
        prototypes: Tensor,
        *,
        weight: float = 0.1,
        class_weight: float = 1.0,
        label_smoothing: float = 0.0,
        options: CAMLossOptions | None = None,
    ) -> None:
        super().__init__()
        if weight < 0 or class_weight < 0:
            raise InputError(f"weights of the losses must not be negative, got {weight} and {class_weight}")
        self.name = name
        self.weight = weight
        self.class_weight = class_weight
        self.label_smoothing = label_smoothing
        terms = parse_objective(name)
        self.factors = [term.factor for term in terms]
        self.cam_losses = nn.ModuleList(
            CAM_LOSSES[term.name](prototypes, options or CAMLossOptions()) for term in terms
        )

    @property
    def losses(self) -> list[CAMLoss]:
        """The losses on explanations; none for `baseline`."""
        return cast(list[CAMLoss], list(self.cam_losses))

    @property
    def needs_masks(self) -> bool:
        """Whether `masks` must be given."""
        return any(loss.needs_masks for loss in self.losses)

    @property
    def differentiates_images(self) -> bool:
        """Whether the images must require a gradient, and the network be one that can be differentiated twice."""
        return any(loss.differentiates_images for loss in self.losses)

    def compile_maps(self) -> None:
        """Compile the CAM losses but for α, as `SplitModel.compile_backbone` does the network but for the head."""
        for loss in self.losses:
            loss.compile_maps()

    def forward(
        self,
        logits: Tensor,
        features: Tensor,
        targets: Tensor,
        images: Tensor,
        *,
        alpha: Alpha | None = None,
        batch_size: int | None = None,
        masks: Tensor | None = None,
    ) -> LossParts:
        """`images` (N, ch, h, w) in [0, 1]; `batch_size` is the size of the global batch; `masks` (N, h, w), bool.

        Raises:
            ValueError: no masks where the objective needs them.
        """
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        entropy = F.cross_entropy(scores, targets, reduction="sum", label_smoothing=self.label_smoothing)
        classification = mean_of_sum(entropy, len(targets), batch_size)
        weighted = classification if self.class_weight == 1 else self.class_weight * classification
        if not self.losses:
            return LossParts(weighted, classification, torch.zeros_like(classification))
        values = []
        for factor, loss in zip(self.factors, self.losses, strict=True):
            further = {}
            if loss.needs_masks:
                if masks is None:
                    raise ValueError(f"objective {self.name} needs masks (N, h, w), true where evidence must not be")
                further["masks"] = masks
            value = loss(logits, features, targets, images, alpha=alpha, batch_size=batch_size, **further)
            values.append(value if factor == 1 else factor * value)
        cam = values[0] if len(values) == 1 else torch.stack(values).sum()
        total = torch.add(weighted, cam, alpha=self.weight)
        return LossParts(total, classification, cam)
