"""Grad-CAM as pure functions of (logits, features): no hooks, no state, no loop over images.

Samples are independent in the head (the part of a network after the target layer), so the gradient
of the *sum* of the chosen logits holds every image's own gradient. One `autograd.grad` call through
the head therefore serves the whole batch and never walks the backbone, in second order neither.
"""

import torch
from torch import Tensor

from .checks import check_features, check_targets


def grad_cam(
    logits: Tensor,
    features: Tensor,
    classes: Tensor | None = None,
    *,
    normalize: bool = True,
    create_graph: bool = False,
    channel_offset: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """Grad-CAM of every image of a batch (Batch-CAM paper, Algorithm 1; Selvaraju et al. 2017, eq. 1-2).

    G_i = ∂L[i, c_i]/∂A_i,  α_i = mean_{u,v} G_i,  M_i = ReLU(Σ_k α_ik A_ik), then min-max per map.

    Args:
        logits: (N, C), computed from `features` with gradients enabled.
        features: (N, K, H, W), the output A of the target layer.
        classes: (N,) class c_i of each map; None takes the predicted class.
        normalize: scale each map to [0, 1]; a constant map becomes zeros.
        create_graph: keep the maps differentiable, for use in a loss.
        channel_offset: see `channel_weights`; the same maps without an (N, K, H, W) gradient.
        validate: check the values of `classes` too; on a GPU that waits for the device once.

    Returns:
        (N, H, W) maps, float32 or better, whatever autocast is doing.

    Raises:
        ValueError: wrong shapes, classes out of range, or logits that do not depend on `features`.
    """
    check_features(logits, features)
    if classes is None:
        classes = logits.detach().argmax(1)
    else:
        check_targets(classes, len(logits), logits.shape[1], values=validate)
    weights = channel_weights(logits, features, classes, channel_offset=channel_offset, create_graph=create_graph)
    maps = weighted_activations(weights, features if create_graph else features.detach()).relu()
    return normalize_maps(maps) if normalize else maps


def channel_weights(
    logits: Tensor,
    features: Tensor,
    classes: Tensor,
    *,
    channel_offset: Tensor | None = None,
    create_graph: bool = False,
) -> Tensor:
    """α_ik = mean_{u,v} ∂L[i, c_i]/∂A_ikuv, the weight of each channel (Selvaraju et al. 2017, eq. 1).

    Args:
        logits: (N, C).
        features: (N, K, H, W).
        classes: (N,) class c_i of each image.
        channel_offset: (N, K) zeros o for which the head computed logits = head(A + o[:, :, None, None]).
            Then Σ_{u,v} ∂L/∂A_ikuv = ∂L/∂o_ik, exactly and in every order of differentiation. A head
            that knows how a constant per channel travels (through a mean-pool, unchanged) adds o
            beyond its pooling, and the (N, K, H, W) gradient is never built.
        create_graph: keep α differentiable.

    Returns:
        (N, K), float32 or better.

    Raises:
        ValueError: the logits do not depend on `features` (or on `channel_offset`).
    """
    source = features if channel_offset is None else channel_offset
    if not (logits.requires_grad and source.requires_grad):
        raise ValueError(
            "logits and features carry no autograd graph: compute both with gradients enabled "
            "(not under torch.no_grad, torch.inference_mode or after detach)"
        )
    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        # retain_graph: the caller goes on to use these logits, for the loss or for another class.
        (gradient,) = torch.autograd.grad(
            logits.gather(1, classes.long()[:, None]).sum(),
            source,
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
        if gradient is None:
            raise ValueError(
                "features are not in the autograd graph of the logits: "
                "pass the very tensor from which the logits were computed"
            )
        gradient = gradient.to(_working_dtype(features))
        if channel_offset is not None:
            return gradient / (features.shape[2] * features.shape[3])
        return gradient.mean((2, 3))


def weighted_activations(weights: Tensor, features: Tensor) -> Tensor:
    """Σ_k w_ik A_ik: (N, K) and (N, K, H, W) to (N, H, W), float32 or better."""
    with torch.autocast(features.device.type, enabled=False):
        activations = features.to(weights.dtype).flatten(2)
        return torch.bmm(weights[:, None], activations).view(len(features), *features.shape[2:])


def normalize_maps(maps: Tensor) -> Tensor:
    """Min-max scaling of each (H, W) map of (N, H, W) to [0, 1]; constant maps become zeros.

    A map counts as constant when its span is within rounding error of its largest value: relative,
    so that scaling a map by any factor changes nothing. Gradients of constant maps are zero.
    """
    low = maps.amin((1, 2), keepdim=True)
    high = maps.amax((1, 2), keepdim=True)
    span = high - low
    rounding = 8 * torch.finfo(maps.dtype).eps * torch.maximum(high.abs(), low.abs())
    varies = (span > rounding) & (span > torch.finfo(maps.dtype).tiny)
    # The inner `where` keeps 0/0 out of the graph: the outer alone would leave NaN gradients.
    scaled = (maps - low) / torch.where(varies, span, torch.ones_like(span))
    return torch.where(varies, scaled, torch.zeros_like(scaled))


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
