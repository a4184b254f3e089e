"""Losses on where the evidence must *not* come from: outside a class's support, or inside an image's mask.

All three square a gradient of the logits, and differentiate it once more. `PrototypeSupportLoss` and
`MaskedGradCAMLoss` differentiate the head alone, as every loss on CAMs; `RightReasonsLoss` the whole network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cam import Alpha, channel_weights, maps_of_weights, pull_back
from .checks import check_features, check_prototypes, check_targets
from .collectives import global_mean
from .distances import resize_maps

SUPPORT = 0.05  # value of a prototype (0 to 1) from which on a pixel belongs to its class's support


class PrototypeSupportLoss(nn.Module):
    """PSL: nothing outside the prototype's support may speak for, or against, any class.

    PSL = 1/N Σ_i Σ_{(u,v): P[y_i]_uv < t} resize(R_i)_uv with R_i = Σ_k ((∂/∂A_i Σ_c log p_ic) ⊙ A_i)²_k.

    This is the right-reasons term of Ross, Hughes, Doshi-Velez (2017, eq. 2), moved from the input to the target
    layer and weighted with its activations, with one support per class in place of one mask per image.

    Args:
        prototypes: (C, h, w) in [0, 1]; where one is below t is outside.
        support: t.
        validate: check target values in every call; on a GPU that waits for the device each time.

    Called with `(logits (N, C), features (N, K, H, W), targets (N,))`; returns an unweighted scalar, scaled such
    that DDP's average over ranks is the mean over the global batch.

    Raises:
        ValueError: wrong shapes, or a prototype without any pixel outside (or inside) of its support.
    """

    needs_masks = False
    differentiates_images = False
    outside: Tensor

    def __init__(self, prototypes: Tensor, support: float = SUPPORT, *, validate: bool = True) -> None:
        super().__init__()
        check_prototypes(prototypes)
        outside = prototypes.detach() < support
        shares = outside.flatten(1).float().mean(1).tolist()
        if useless := [str(c) for c, share in enumerate(shares) if share in (0, 1)]:
            raise ValueError(
                f"the prototypes of classes {', '.join(useless)} are below the support of {support:g} nowhere or "
                "everywhere: set another, or supply prototypes that are dark where nothing should count"
            )
        self.register_buffer("outside", outside, persistent=False)
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
        check_targets(targets, len(logits), len(self.outside), values=self.validate)
        with torch.autocast(features.device.type, enabled=False):
            evidence = _gradient_of_log_probabilities(logits, features) * features
            relevance = resize_maps(evidence.square().sum(1), (self.outside.shape[1], self.outside.shape[2]))
            losses = (relevance * self.outside[targets.long()]).sum((1, 2))
        return global_mean(losses, batch_size)

    def compile_maps(self) -> None:
        """Nothing: all of it is differentiated twice, which compiled code cannot be."""


class RightReasonsLoss(nn.Module):
    """RRR: the input must not matter inside each image's mask (Ross, Hughes, Doshi-Velez 2017, eq. 2).

    RRR = 1/N Σ_i Σ_d (mask_id · ∂/∂x_id Σ_c log p_ic)², x in [0, 1]; the sum of the paper is a mean over images here.

    Args:
        validate: check target values in every call.

    Called with `(logits (N, C), features, targets (N,), images (N, ch, h, w) that require a gradient,
    masks=(N, h, w))`: true where the input must not matter. The second-order gradient goes through the whole network.
    """

    needs_masks = True
    differentiates_images = True

    def __init__(self, *, validate: bool = True) -> None:
        super().__init__()
        self.validate = validate

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
        check_targets(targets, len(logits), logits.shape[1], values=self.validate)
        _check_masks(masks, images)
        with torch.autocast(images.device.type, enabled=False):
            gradient = _gradient_of_log_probabilities(logits, images)
            losses = (gradient.square() * masks[:, None]).sum((1, 2, 3))
        return global_mean(losses, batch_size)

    def compile_maps(self) -> None:
        """Nothing: all of it is differentiated twice, which compiled code cannot be."""


class MaskedGradCAMLoss(nn.Module):
    """RRR-G: the target's Grad-CAM must not lie inside each image's mask (Schramowski et al. 2020).

    RRR-G = 1/N Σ_i Σ_uv (mask_i ⊙ resize(M_i))²_uv, with M_i min-max scaled. Published code takes α for a constant;
    here the gradient goes through α too, as in all of Batch-CAM.

    Args:
        validate: check target values in every call.

    Called with `(logits (N, C), features (N, K, H, W), targets (N,), images (N, ch, h, w), masks=(N, h, w))`.
    """

    needs_masks = True
    differentiates_images = False

    def __init__(self, *, validate: bool = True) -> None:
        super().__init__()
        self.validate = validate

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
        check_targets(targets, len(logits), logits.shape[1], values=self.validate)
        _check_masks(masks, images)
        weights = channel_weights(
            logits, features, targets, create_graph=torch.is_grad_enabled(), alpha=alpha, validate=False
        )
        with torch.autocast(features.device.type, enabled=False):
            maps = resize_maps(maps_of_weights(weights, features), (masks.shape[1], masks.shape[2]))
            losses = (maps.square() * masks).sum((1, 2))
        return global_mean(losses, batch_size)

    def compile_maps(self) -> None:
        """Nothing: beside α there is too little to gain."""


def _gradient_of_log_probabilities(logits: Tensor, source: Tensor) -> Tensor:
    """∂/∂source_i Σ_c log p_ic, of the shape of `source`; differentiable if gradients are enabled."""
    log_probabilities = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    return pull_back(log_probabilities, source, torch.ones_like(log_probabilities))


def _check_masks(masks: Tensor, images: Tensor) -> None:
    if images.ndim != 4 or masks.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"images (N, ch, h, w) need masks (N, h, w), got {tuple(images.shape)} and {tuple(masks.shape)}"
        )
