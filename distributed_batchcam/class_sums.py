"""Per-class CAMs of a global batch: sums and counts per class, and the two all-reduces.

For each class c with N_c samples in the global batch (Batch-CAM paper, eq. 3-5):

    Ā_c = 1/N_c Σ A_i,   ᾱ_c = 1/N_c Σ α_i,   M̄_c = normalise(ReLU(Σ_k ᾱ_ck Ā_ck)).

Averaging each rank's own M̄_c is not M̄_c of the global batch, hence the reductions:

* `sums`: one all-reduce of counts, Σα and ΣA, C·(1 + K + K·H·W) numbers; none in the backward.
* `factored`: the map before the ReLU is linear in ΣA once Σα is global, so an all-reduce of counts and
  Σα, C·(1 + K) numbers, then one of the weighted maps, C·H·W; one of C·K in the backward.
* `local`: this rank only.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cam import Alpha, channel_weights, normalize_maps, weighted_activations
from .checks import check_features, check_targets
from .collectives import Upstream, all_reduce_sum, all_reduce_sums

Reduction = Literal["factored", "sums", "local"]


class SummedAlpha(ABC):
    """An α (see `cam.channel_weights`) that knows its sums by class in fewer operations than image by image."""

    @abstractmethod
    def __call__(self, classes: Tensor) -> Tensor:
        """Classes (N,) to α (N, K)."""

    @abstractmethod
    def class_sums(self, targets: Tensor) -> Tensor:
        """Targets (N,) to Σ_{i: y_i = c} α_i of each of the head's classes c, (C, K)."""


class ClassCams(NamedTuple):
    """One CAM per class: `maps` (C, H, W), zeros for an absent class, and samples per class `counts` (C,)."""

    maps: Tensor
    counts: Tensor


class ClassSums(NamedTuple):
    """Sufficient statistics of class CAMs; they add up over batches and over ranks."""

    counts: Tensor  # (C,)
    weights: Tensor  # Σα, (C, K)
    features: Tensor  # ΣA, (C, K, H, W)


def class_cams(
    logits: Tensor,
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    *,
    reduction: Reduction = "factored",
    normalize: bool = True,
    create_graph: bool = False,
    alpha: Alpha | None = None,
    validate: bool = True,
) -> ClassCams:
    """One CAM per class from the averaged features and gradients of the global batch (paper, eq. 3-5).

    Args:
        logits: (N, C) of this rank's share of the global batch; N may be 0.
        features: (N, K, H, W).
        targets: (N,) target classes; α is taken of the target's logit.
        num_classes: C.
        reduction: `factored`, `sums` (both over all ranks, equal up to rounding) or `local`.
            Without a process group they agree. Every rank must make the call in every step.
        normalize: scale each map to [0, 1]; a constant map becomes zeros.
        create_graph: keep the maps differentiable, for use in a loss. Their gradients are such that
            DDP's average over ranks is the gradient of one process on the whole batch.
        alpha: see `cam.channel_weights`.
        validate: check the values of `targets` too; on a GPU that waits for the device once.

    Returns:
        `ClassCams(maps (C, H, W), counts (C,))`, counts as floats, over all ranks.

    Raises:
        ValueError: wrong shapes, targets out of range, an unknown reduction, or logits that do not
            depend on `features`.
    """
    check_features(logits, features)
    check_targets(targets, len(logits), min(num_classes, logits.shape[1]), values=validate)
    check_reduction(reduction)
    return class_cams_of_weights(
        class_weights(logits, features, targets, num_classes, alpha=alpha, create_graph=create_graph, validate=False),
        features if create_graph else features.detach(),
        targets,
        num_classes,
        reduction=reduction,
        normalize=normalize,
    )


def class_weights(
    logits: Tensor,
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    *,
    alpha: Alpha | None = None,
    create_graph: bool = False,
    validate: bool = True,
) -> Tensor:
    """Σ_{i: y_i = c} α_i, (C, K), of this rank's images; the arguments are those of `class_cams`."""
    if not isinstance(alpha, SummedAlpha) or num_classes != logits.shape[1]:
        weights = channel_weights(logits, features, targets, alpha=alpha, create_graph=create_graph, validate=validate)
        return sum_by_class(weights, targets.long(), num_classes)
    check_features(logits, features)
    check_targets(targets, len(logits), num_classes, values=validate)
    with torch.set_grad_enabled(create_graph), torch.autocast(features.device.type, enabled=False):
        return alpha.class_sums(targets.long()).to(torch.promote_types(features.dtype, torch.float32))


def class_cams_of_weights(
    weights: Tensor,
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    *,
    reduction: Reduction = "factored",
    normalize: bool = True,
) -> ClassCams:
    """`class_cams` from this rank's Σα (C, K) and A (N, K, H, W)."""
    targets = targets.long()
    counts = count_by_class(targets, num_classes).to(weights.dtype)
    if reduction == "sums":
        local = ClassSums(counts, weights, sum_by_class(features.to(weights.dtype), targets, num_classes))
        counts, weights, features = all_reduce_sums(local, Upstream.REPLICATED)
        maps = _weighted_sums(weights, features)
    else:
        counts, maps = _factored(counts, weights, features, targets, over_ranks=reduction == "factored")
    # Between 0 and 1 a map of sums is the map of means.
    return ClassCams(normalize_maps(maps.relu()) if normalize else _mean_maps(maps, counts), counts)


def cams_of_sums(sums: ClassSums) -> ClassCams:
    """ReLU(Σ_k ᾱ_ck Ā_ck) of each class, not normalised (paper, eq. 5)."""
    return ClassCams(_mean_maps(_weighted_sums(sums.weights, sums.features), sums.counts), sums.counts)


def check_reduction(reduction: str) -> None:
    """Require a known reduction."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")


def _weighted_sums(weights: Tensor, features: Tensor) -> Tensor:
    """Σ_k (Σα)_ck (ΣA)_ck of (C, K) and (C, K, H, W); written out, as so few maps are no work for a matrix product."""
    return (weights[:, :, None, None] * features).sum(1)


def _mean_maps(maps: Tensor, counts: Tensor) -> Tensor:
    """ReLU(Σ_k ᾱ_ck Ā_ck) from Σ_k (Σα)_ck (ΣA)_ck: one N_c of each mean."""
    return (maps / counts.clamp(min=1).square()[:, None, None]).relu()


def count_by_class(targets: Tensor, num_classes: int) -> Tensor:
    """Samples of each class, (C,), as floats; without waiting for the device, as bincount does."""
    ones = torch.ones(len(targets), device=targets.device)
    return ones.new_zeros(num_classes).index_add(0, targets, ones)


def sum_by_class(values: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Σ_{i: y_i = c} of `values` (N, …): (C, …)."""
    if torch.compiler.is_compiling() or not values.requires_grad:
        return values.new_zeros(num_classes, *values.shape[1:]).index_add(0, targets, values)
    sums: Tensor = _SumByClass.apply(values, targets, num_classes)
    return sums


class _SumByClass(torch.autograd.Function):
    """Σ_{i: y_i = c} of (N, …), by index_add rather than a one-hot matrix product: exact whatever the TF32 setting.

    index_add's own backward returns a view, which autograd cannot add the head's gradient to in place.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, targets: Tensor, num_classes: int) -> Tensor:
        ctx.save_for_backward(targets)
        rows = _in_order_of_memory(values)
        sums = rows.new_zeros(num_classes, *rows.shape[1:]).index_add_(0, targets, rows)
        return sums if rows is values else sums.movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (targets,) = ctx.saved_tensors
        rows = _in_order_of_memory(grad)
        if rows is grad:
            return grad.index_select(0, targets), None, None
        shape = (len(targets), *grad.shape[1:])
        buffer = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        torch.index_select(rows, 0, targets, out=buffer.movedim(1, -1))
        return buffer, None, None


def _in_order_of_memory(maps: Tensor) -> Tensor:
    """Channels-last maps (N, K, H, W) as (N, H, W, K); anything else as it is."""
    if maps.ndim == 4 and not maps.is_contiguous() and maps.is_contiguous(memory_format=torch.channels_last):
        return maps.movedim(1, -1)
    return maps


def _factored(
    counts: Tensor, weights: Tensor, features: Tensor, targets: Tensor, *, over_ranks: bool
) -> tuple[Tensor, Tensor]:
    """Counts and Σ_k (Σα)_ck (ΣA)_ck of all ranks, (C,) and (C, H, W), from a rank's counts, Σα, A and targets."""
    num_classes = len(counts)
    if over_ranks:
        # The ranks' samples differ, so their gradients of Σα are partial; the counts need none.
        counts, weights = all_reduce_sums((counts, weights), Upstream.PARTIAL)
    # Σ_i Σ_k (Σα)_ck A_ik of each class: over whichever of i and k leaves less to go on with, first.
    if num_classes < len(targets):
        maps = _weighted_sums(weights, sum_by_class(features.to(weights.dtype), targets, num_classes))
    else:
        maps = sum_by_class(weighted_activations(weights.index_select(0, targets), features), targets, num_classes)
    if over_ranks:
        maps = all_reduce_sum(maps, Upstream.REPLICATED)
    return counts, maps
