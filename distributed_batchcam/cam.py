"""Grad-CAM as pure functions of (logits, features): no hooks, no state, no loop over images.

Samples are independent in the head (the part of a network after the target layer), so the gradient
of the *sum* of the chosen logits holds every image's own gradient. One `autograd.grad` call through
the head therefore serves the whole batch and never walks the backbone, in second order neither.
Grad-CAM needs that gradient's spatial mean α alone; a head that knows it in closed form hands it in.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_features, check_targets

Alpha = Callable[[Tensor], Tensor]
"""Classes c (N,) to α (N, K), α_ik = mean_{u,v} ∂L[i, c_i]/∂A_ikuv: what a head knows about itself."""


def grad_cam(
    logits: Tensor,
    features: Tensor,
    classes: Tensor | None = None,
    *,
    normalize: bool = True,
    create_graph: bool = False,
    alpha: Alpha | None = None,
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
        alpha: see `channel_weights`; the same maps without an (N, K, H, W) gradient.
        validate: check the values of `classes` too; on a GPU that waits for the device once.

    Returns:
        (N, H, W) maps, float32 or better, whatever autocast is doing.

    Raises:
        ValueError: wrong shapes, classes out of range, or logits that do not depend on `features`.
    """
    weights = channel_weights(logits, features, classes, alpha=alpha, create_graph=create_graph, validate=validate)
    return maps_of_weights(weights, features if create_graph else features.detach(), normalize=normalize)


def channel_weights(
    logits: Tensor,
    features: Tensor,
    classes: Tensor | None = None,
    *,
    alpha: Alpha | None = None,
    create_graph: bool = False,
    validate: bool = True,
) -> Tensor:
    """α_ik = mean_{u,v} ∂L[i, c_i]/∂A_ikuv, the weight of each channel (Selvaraju et al. 2017, eq. 1).

    Args:
        logits: (N, C).
        features: (N, K, H, W).
        classes: (N,) class c_i of each image; None takes the predicted class.
        alpha: gives the same α for these classes, from what the head knows of itself; where it is None,
            autograd finds α through the head. It is called with gradients enabled if `create_graph` is set,
            and must then be differentiable as autograd's α is.
        create_graph: keep α differentiable.
        validate: check the values of `classes` too; on a GPU that waits for the device once.

    Returns:
        (N, K), float32 or better.

    Raises:
        ValueError: wrong shapes, classes out of range, logits that do not depend on `features`, or an `alpha`
            of another shape.
    """
    check_features(logits, features)
    if classes is None:
        classes = logits.detach().argmax(1)
    else:
        check_targets(classes, len(logits), logits.shape[1], values=validate)
    classes = classes.long()
    with torch.set_grad_enabled(create_graph), torch.autocast(features.device.type, enabled=False):
        if alpha is None:
            return gradient_of_logits(logits, features, classes).to(_working_dtype(features)).mean((2, 3))
        weights = alpha(classes).to(_working_dtype(features))
        if weights.shape != features.shape[:2]:
            raise ValueError(f"alpha must give (N, K) = {tuple(features.shape[:2])}, got {tuple(weights.shape)}")
        return weights


def gradient_of_logits(logits: Tensor, source: Tensor, classes: Tensor) -> Tensor:
    """∂L[i, c_i]/∂source_i of each image i, of the shape of `source` (N, …); differentiable if gradients are enabled.

    Raises:
        ValueError: the logits do not depend on `source`.
    """
    return pull_back(logits, source, torch.zeros_like(logits).scatter_(1, classes[:, None], 1))


def pull_back(outputs: Tensor, source: Tensor, cotangents: Tensor, name: str = "features") -> Tensor:
    """Σ_c w_ic ∂outputs[i, c]/∂source_i with cotangents w (N, C), as `gradient_of_logits`; `name` is for messages."""
    if not (outputs.requires_grad and source.requires_grad):
        raise ValueError(
            f"logits and {name} carry no autograd graph: compute both with gradients enabled "
            "(not under torch.no_grad, torch.inference_mode or after detach)"
        )
    (gradient,) = torch.autograd.grad(
        outputs,
        source,
        grad_outputs=cotangents,
        create_graph=torch.is_grad_enabled(),
        # The caller goes on to use these logits, for the loss or for another class.
        retain_graph=True,
        allow_unused=True,
    )
    if gradient is None:
        raise ValueError(
            f"{name} are not in the autograd graph of the logits: "
            "pass the very tensor from which the logits were computed"
        )
    return gradient


def maps_of_weights(weights: Tensor, features: Tensor, *, normalize: bool = True) -> Tensor:
    """ReLU(Σ_k α_ik A_ik) of α (N, K) and A (N, K, H, W): (N, H, W), min-max scaled if asked for."""
    maps = weighted_activations(weights, features).relu()
    return normalize_maps(maps) if normalize else maps


def weighted_activations(weights: Tensor, features: Tensor) -> Tensor:
    """Σ_k w_ik A_ik: (N, K) and (N, K, H, W) to (N, H, W), float32 or better."""
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(weights.dtype)
        if torch.compiler.is_compiling():
            # Fused, in float32 and without the product in memory.
            return (weights[:, :, None, None] * features).sum(1)
        maps: Tensor = _WeightedSum.apply(weights, features)
        return maps


class _WeightedSum(torch.autograd.Function):
    """Σ_k w_k A_k of (N, K) and (N, K, H, W).

    By itself autograd would take its products at the precision that the user allows matrix products, which may
    be TF32, and its outer product as a matrix product of inner size 1, at twice the time. It would also return a
    view, which it cannot add the head's gradient to in place.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, features: Tensor) -> Tensor:
        ctx.save_for_backward(weights, features)
        with _full_precision(weights.device):
            maps = torch.bmm(weights[:, None], features.flatten(2))
        return maps.view(len(features), *features.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weights, features = ctx.saved_tensors
        of_weights = of_features = None
        if ctx.needs_input_grad[0]:
            with _full_precision(weights.device):
                of_weights = torch.bmm(features.flatten(2), grad.flatten(1)[:, :, None])[:, :, 0]
        if ctx.needs_input_grad[1]:
            # In the features' order in memory, that of the gradient it will be added to.
            buffer = torch.empty_like(features)
            of_features = torch.mul(weights[:, :, None, None], grad[:, None], out=buffer)
        return of_weights, of_features


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 in float32, whatever is allowed elsewhere (TF32, bfloat16)."""
    backends = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul  # type: ignore[attr-defined]
    allowed = backend.fp32_precision
    if allowed in ("ieee", "none"):  # to set it takes as long as a small product
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = allowed


def normalize_maps(maps: Tensor) -> Tensor:
    """Min-max scaling of each (H, W) map of (N, H, W) to [0, 1]; constant maps become zeros.

    A map counts as constant when its span is within rounding error of its largest value: relative,
    so that scaling a map by any factor changes nothing. Gradients of constant maps are zero.
    """
    low, high = torch.aminmax(maps.flatten(1), dim=1, keepdim=True)
    span = high - low
    with torch.no_grad():
        # max(high, -low) is the largest absolute value.
        rounding = 8 * torch.finfo(maps.dtype).eps * torch.maximum(high, -low)
        constant = span <= rounding.clamp_(min=torch.finfo(maps.dtype).tiny)
    # Divided by infinity a constant map is zero, and so is its gradient: no 0/0 in either direction.
    return (maps - low[:, :, None]) / span.masked_fill(constant, torch.inf)[:, :, None]


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
