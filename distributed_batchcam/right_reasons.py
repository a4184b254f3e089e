"""Losses on where the evidence must *not* come from: outside a class's support, where the training images depart from
the prototypes, or inside an image's mask.

All of them square what a gradient of the logits gives, and differentiate it once more. `PrototypeSupportLoss` and
`MaskedGradCAMLoss` differentiate the head twice, as every loss on CAMs; `PrototypeDepartureLoss` and
`RightReasonsLoss` the whole network.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .cam import Alpha, channel_weights, maps_of_weights, pull_back
from .cam_loss import CAMLoss
from .checks import check_features, check_prototypes, check_targets
from .collectives import global_mean
from .distances import resize_maps
from .errors import InputError

Evidence = Literal["log_probabilities", "margin"]

SUPPORT = 0.05  # value of a prototype (0 to 1) from which on a pixel belongs to its class's support
DEPARTURE = 0.36  # of the mean training images from the prototypes, in standard deviations, for a cue to be there
_FITTING_ROUNDS, _NEAR = 10, 1e-3  # of the reweighting; a deviation below which all weigh the same


class PrototypeSupportLoss(CAMLoss):
    """PSL: nothing outside the prototype's support may speak for, or against, any class.

    PSL = 1/N Σ_i Σ_{(u,v): P[y_i]_uv < t} resize(R_i)_uv with R_i = Σ_k ((∂S_i/∂A_i) ⊙ A_i)²_k.

    With S_i = Σ_c log p_ic this is the right-reasons term of Ross, Hughes, Doshi-Velez (2017, eq. 2), moved from the
    input to the target layer and weighted with its activations, with one support per class in place of one mask per
    image. It has no slope where all classes are as probable, as at the beginning, and C² times the slope of a logit
    where one is certain. The margin S_i = L[i, y_i] - max_{c ≠ y_i} L[i, c] has neither trait.

    Args:
        prototypes: (C, h, w) in [0, 1]; where one is below t is outside.
        support: t.
        evidence: S, `log_probabilities` or `margin`.
        validate: check target values in every call; on a GPU that waits for the device each time.

    Called with `(logits (N, C), features (N, K, H, W), targets (N,))`; returns an unweighted scalar, scaled such
    that DDP's average over ranks is the mean over the global batch.

    Raises:
        ValueError: wrong shapes.
        InputError: a prototype without any pixel outside (or inside) of its support.
    """

    outside: Tensor

    def __init__(
        self,
        prototypes: Tensor,
        support: float = SUPPORT,
        *,
        evidence: Evidence = "log_probabilities",
        validate: bool = True,
    ) -> None:
        super().__init__()
        check_prototypes(prototypes)
        outside = prototypes.detach() < support
        shares = outside.flatten(1).float().mean(1).tolist()
        if useless := [str(c) for c, share in enumerate(shares) if share in (0, 1)]:
            raise InputError(
                f"prototypes of classes (counted from 0) {', '.join(useless)} are below the support {support:g} "
                "everywhere or nowhere: choose another, or prototypes that are dark where nothing should count"
            )
        if evidence not in get_args(Evidence):
            raise ValueError(f"evidence must be one of {', '.join(get_args(Evidence))}, got {evidence!r}")
        self.register_buffer("outside", outside, persistent=False)
        self.evidence = evidence
        self.validate = validate

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
        """Neither `images` nor `alpha` is used: α is a spatial mean, and here each position counts."""
        check_features(logits, features)
        if logits.shape[1] != len(self.outside):
            raise ValueError(f"{len(self.outside)} prototypes (C, h, w) for logits of {logits.shape[1]} classes")
        check_targets(targets, len(logits), len(self.outside), values=self.validate)
        with torch.autocast(features.device.type, enabled=False):
            if self.evidence == "margin":
                gradient = _gradient_of_margin(logits, features, targets.long())
            else:
                gradient = _gradient_of_log_probabilities(logits, features, "features")
            evidence = gradient * features.to(gradient.dtype)
            relevance = resize_maps(evidence.square().sum(1), (self.outside.shape[1], self.outside.shape[2]))
            losses = (relevance * self.outside[targets.long()]).sum((1, 2))
        return global_mean(losses, batch_size)


class PrototypeDepartureLoss(CAMLoss):
    """PDL: where the training images, all in all, are not what the prototypes say, the difference must not matter.

    PDL = 1/N Σ_i Σ_{(u,v) in D} ((x_i - E[y_i]) ⊙ ∂/∂x_i Σ_c log p_ic)²_uv, summed over channels, x in [0, 1], with
    E_c = a_c·P_c + b_c the fit of prototype c to the mean training image M_c of its class (least absolute deviations)
    and D where δ = |Σ_c (M_c - E_c)| / √(C·Σ_c Q_c·(1 - Q_c)) is above t, with all around it that is above t/2: what is
    too bright or too dark in the data as a whole. Q_c = (M_c + E_c)/2: δ is the standardised difference of two means,
    for values in [0, 1] of the largest variance that they can have.

    The right-reasons term of Ross, Hughes, Doshi-Velez (2017, eq. 2) with one region for all images, found from C
    prototypes instead of a mask for every image, and weighted with what the prototype does not account for. The mean
    over classes tells a cue from the chance of a prototype made of few images; of a cue that few classes have, or that
    moves about, little is left in it.

    Args:
        prototypes: (C, h, w) in [0, 1], of images known to be without the cue.
        means: (C, h, w), the mean training image of each class, as the images are (not min-max scaled).
        threshold: t, in standard deviations.
        validate: check target values in every call.

    Called with `(logits (N, C), features, targets (N,), images (N, ch, h, w))`: logits computed from images that
    require a gradient, to whose size E and D are resized. The second-order gradient goes through the whole
    network, as that of `RightReasonsLoss`. Returns an unweighted scalar, scaled such that DDP's average over ranks is
    the mean over the global batch.

    Raises:
        ValueError: wrong shapes, targets out of range, or logits that do not depend on the images.
        InputError: the departure is nowhere, or everywhere.
    """

    differentiates_images = True
    expected: Tensor
    departs: Tensor

    def __init__(
        self, prototypes: Tensor, means: Tensor, threshold: float = DEPARTURE, *, validate: bool = True
    ) -> None:
        super().__init__()
        check_prototypes(prototypes)
        if means.shape != prototypes.shape:
            raise ValueError(
                f"prototypes and means must have one shape, got {tuple(prototypes.shape)} and {tuple(means.shape)}"
            )
        expected = _fitted(prototypes.detach(), means.detach().to(prototypes))
        departure = _standardised_difference(means.to(expected), expected.clamp(0, 1))
        departs = _spread(departure > threshold, departure > threshold / 2)
        if not departs.any() or departs.all():
            raise InputError(
                f"the training images depart from the prototypes by {departure.max():.2f} standard deviations at most, "
                f"{'everywhere' if departs.all() else 'nowhere'} by more than --departure {threshold:g}: name another, "
                "or prototypes of images that are known to be without the cue (--prototypes FOLDER)"
            )
        self.register_buffer("expected", expected, persistent=False)
        self.register_buffer("departs", departs, persistent=False)
        self.departure = departure
        self.validate = validate

    @property
    def note(self) -> str:
        """How much of the image departs."""
        return (
            "the training images depart from the prototypes in "
            f"{int(self.departs.sum())} of {self.departs.numel()} pixels, by {self.departure.max():.2f} standard "
            "deviations at most"
        )

    @property
    def pictures(self) -> dict[str, Tensor]:
        """The departure, white where it is largest."""
        return {"departure": self.departure / self.departure.max()}

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
        """Neither `features` nor `alpha` is used."""
        check_features(logits, features)
        if logits.shape[1] != len(self.expected):
            raise ValueError(f"{len(self.expected)} prototypes (C, h, w) for logits of {logits.shape[1]} classes")
        check_targets(targets, len(logits), logits.shape[1], values=self.validate)
        if images.ndim != 4 or len(images) != len(logits):
            raise ValueError(f"images must have shape ({len(logits)}, ch, h, w), got {tuple(images.shape)}")
        with torch.autocast(images.device.type, enabled=False):
            gradient = _gradient_of_log_probabilities(logits, images, "images")
            size = (images.shape[2], images.shape[3])
            expected = resize_maps(self.expected, size)[targets.long()].to(gradient.dtype)
            departs = resize_maps(self.departs[None].to(gradient.dtype), size) > 0.5
            unexpected = (images.detach() - expected[:, None]) * departs
            losses = (gradient * unexpected).square().sum((1, 2, 3))
        return global_mean(losses, batch_size)


def _fitted(prototypes: Tensor, means: Tensor) -> Tensor:
    """a_c·P_c + b_c (C, h, w), nearest to M_c in absolute deviations, by reweighted least squares.

    Prototypes are min-max scaled, images are not. Squares would let the cue itself have its say in the fit.
    """
    fitted, weights = means, torch.ones_like(means)
    for _ in range(_FITTING_ROUNDS):
        total = weights.sum((1, 2), keepdim=True)
        middle, level = ((weights * maps).sum((1, 2), keepdim=True) / total for maps in (prototypes, means))
        centred = prototypes - middle
        variation = (weights * centred.square()).sum((1, 2), keepdim=True).clamp(min=torch.finfo(means.dtype).tiny)
        fitted = level + (weights * centred * (means - level)).sum((1, 2), keepdim=True) / variation * centred
        weights = 1 / (means - fitted).abs().clamp(min=_NEAR)
    return fitted


def _standardised_difference(means: Tensor, expected: Tensor) -> Tensor:
    """δ (h, w) of two (C, h, w) in [0, 1]."""
    middle = (means + expected) / 2
    return (means - expected).mean(0).abs() / (middle * (1 - middle)).mean(0).sqrt().clamp(min=_NEAR)


def _spread(seeds: Tensor, ground: Tensor) -> Tensor:
    """Pixels (h, w) of `ground` that hang together with `seeds`, by sides or corners."""
    while True:
        grown = (F.max_pool2d(seeds[None].float(), 3, stride=1, padding=1)[0] > 0) & ground
        if torch.equal(grown, seeds):
            return seeds
        seeds = grown


class _MaskedLoss(CAMLoss):
    needs_masks = True

    def __init__(self, *, validate: bool = True) -> None:
        super().__init__()
        self.validate = validate


class RightReasonsLoss(_MaskedLoss):
    """RRR: the input must not matter inside each image's mask (Ross, Hughes, Doshi-Velez 2017, eq. 2).

    RRR = 1/N Σ_i Σ_d (mask_id · ∂/∂x_id Σ_c log p_ic)², x in [0, 1]; the sum of the paper is a mean over images here.

    Args:
        validate: check target values in every call.

    Called with `(logits (N, C), features, targets (N,), images (N, ch, h, w), masks=(N, h, w))`: logits computed
    from images that require a gradient, masks true where the input must not matter. The second-order gradient goes
    through the whole network. Where that takes batch statistics, what an image does to the others' logits counts too.

    Raises:
        ValueError: wrong shapes, targets out of range, or logits that do not depend on the images.
    """

    differentiates_images = True

    def forward(
        self,
        logits: Tensor,
        features: Tensor,
        targets: Tensor,
        images: Tensor,
        *,
        masks: Tensor,
        alpha: Alpha | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Neither `features` nor `alpha` is used."""
        check_features(logits, features)
        check_targets(targets, len(logits), logits.shape[1], values=self.validate)
        _check_masks(masks, images, len(logits))
        with torch.autocast(images.device.type, enabled=False):
            gradient = _gradient_of_log_probabilities(logits, images, "images")
            losses = (gradient.square() * masks[:, None]).sum((1, 2, 3))
        return global_mean(losses, batch_size)


class MaskedGradCAMLoss(_MaskedLoss):
    """RRR-G: the target's Grad-CAM must not lie inside each image's mask (Schramowski et al. 2020).

    RRR-G = 1/N Σ_i Σ_uv (mask_i ⊙ resize(M_i))²_uv with M_i of the target class, min-max scaled. Published code takes
    α for a constant; here the gradient goes through α too, as in all of Batch-CAM.

    Args:
        validate: check target values in every call.

    Called with `(logits (N, C), features (N, K, H, W), targets (N,), images (N, ch, h, w), masks=(N, h, w))`: masks
    true where the map must not be.

    Raises:
        ValueError: wrong shapes, or targets out of range.
    """

    def forward(
        self,
        logits: Tensor,
        features: Tensor,
        targets: Tensor,
        images: Tensor,
        *,
        masks: Tensor,
        alpha: Alpha | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Of `images` the shape alone is used."""
        weights = channel_weights(
            logits, features, targets, create_graph=torch.is_grad_enabled(), alpha=alpha, validate=self.validate
        )
        _check_masks(masks, images, len(logits))
        with torch.autocast(features.device.type, enabled=False):
            maps = resize_maps(maps_of_weights(weights, features), (masks.shape[1], masks.shape[2]))
            losses = (maps.square() * masks).sum((1, 2))
        return global_mean(losses, batch_size)


def _gradient_of_log_probabilities(logits: Tensor, source: Tensor, name: str) -> Tensor:
    """∂/∂source_i Σ_c log p_ic, float32 or better; differentiable if gradients are enabled."""
    # ∂/∂L_ik Σ_c log p_ic = 1 - C·p_ik. As a cotangent it needs no graph of its own, which no_grad would not give it.
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cotangents = 1 - logits.shape[1] * F.softmax(scores, dim=1)
    gradient = pull_back(logits, source, cotangents.to(logits.dtype), name)
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _gradient_of_margin(logits: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    """∂/∂A_i (L[i, y_i] - max_{c ≠ y_i} L[i, c]), float32 or better; differentiable if gradients are enabled."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    own = targets[:, None] == classes
    rivals = logits.detach().masked_fill(own, -torch.inf).argmax(1)
    gradient = pull_back(logits, features, own.to(logits.dtype) - (rivals[:, None] == classes).to(logits.dtype))
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _check_masks(masks: Tensor, images: Tensor, samples: int) -> None:
    if images.ndim != 4 or masks.shape != (len(images), *images.shape[2:]) or len(images) != samples:
        raise ValueError(
            f"images and masks of {samples} samples must have shapes (N, ch, h, w) and (N, h, w), "
            f"got {tuple(images.shape)} and {tuple(masks.shape)}"
        )
