"""Per-class CAMs of a global batch: sums and counts per class, and the two all-reduces.

For each class c with N_c samples in the global batch (Batch-CAM paper, eq. 3-5):

    Ā_c = 1/N_c Σ A_i,   ᾱ_c = 1/N_c Σ α_i,   M̄_c = normalise(ReLU(Σ_k ᾱ_ck Ā_ck)).

Averaging each rank's own M̄_c is not M̄_c of the global batch, hence the reductions:

* `sums`: one all-reduce of counts, Σα and ΣA, C·(1 + K + K·H·W) numbers; none in the backward.
* `factored`: the map before the ReLU is linear in ΣA once Σα is global, so an all-reduce of counts and
  Σα, C·(1 + K) numbers, then one of the weighted maps, C·H·W; one of C·K in the backward.
* `local`: this rank only.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .cam import Alpha, channel_weights, normalize_maps, weighted_activations
from .checks import check_features, check_targets
from .collectives import Upstream, all_reduce_sum, all_reduce_sums

Reduction = Literal["factored", "sums", "local"]


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
    weights = channel_weights(logits, features, targets, alpha=alpha, create_graph=create_graph, validate=False)
    return class_cams_of_weights(
        weights,
        features if create_graph else features.detach(),
        targets,
        num_classes,
        reduction=reduction,
        normalize=normalize,
    )


def class_cams_of_weights(
    weights: Tensor,
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    *,
    reduction: Reduction = "factored",
    normalize: bool = True,
) -> ClassCams:
    """`class_cams` from each image's α (N, K) and A (N, K, H, W)."""
    targets = targets.long()
    if reduction == "sums":
        local = local_class_sums(weights, features, targets, num_classes)
        cams = cams_of_sums(ClassSums(*all_reduce_sums(local, Upstream.REPLICATED)))
    else:
        cams = _factored_cams(weights, features, targets, num_classes, over_ranks=reduction == "factored")
    return cams._replace(maps=normalize_maps(cams.maps)) if normalize else cams


def local_class_sums(weights: Tensor, features: Tensor, targets: Tensor, num_classes: int) -> ClassSums:
    """Counts, Σα and ΣA per class of one batch of one rank: α (N, K), A (N, K, H, W), targets (N,)."""
    return ClassSums(
        counts=_count(weights, targets, num_classes),
        weights=_sum_by_class(weights, targets, num_classes),
        features=_sum_by_class(features.to(weights.dtype), targets, num_classes),
    )


def cams_of_sums(sums: ClassSums) -> ClassCams:
    """ReLU(Σ_k ᾱ_ck Ā_ck) of each class, not normalised (paper, eq. 5)."""
    return ClassCams(_mean_maps(weighted_activations(sums.weights, sums.features), sums.counts), sums.counts)


def check_reduction(reduction: str) -> None:
    """Require a known reduction."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")


def _mean_maps(maps: Tensor, counts: Tensor) -> Tensor:
    """ReLU(Σ_k ᾱ_ck Ā_ck) from Σ_k (Σα)_ck (ΣA)_ck: one N_c of each mean."""
    return (maps / counts.clamp(min=1).square()[:, None, None]).relu()


def _count(like: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    return like.new_zeros(num_classes).index_add(0, targets, like.new_ones(len(targets)))


def _sum_by_class(values: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Σ_{i: y_i = c} of `values` (N, …): (C, …)."""
    if values.ndim == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last):
        # In the order of memory, which a view keeps both ways.
        return _sum_by_class(values.movedim(1, 3), targets, num_classes).movedim(3, 1)
    # index_add rather than a one-hot matrix product: exact in float32 whatever the TF32 setting.
    sums = values.new_zeros(num_classes, math.prod(values.shape[1:])).index_add(0, targets, values.flatten(1))
    return sums.view(num_classes, *values.shape[1:])


def _factored_cams(
    weights: Tensor, features: Tensor, targets: Tensor, num_classes: int, *, over_ranks: bool
) -> ClassCams:
    counts = _count(weights, targets, num_classes)
    weights = _sum_by_class(weights, targets, num_classes)
    if over_ranks:
        # The ranks' samples differ, so their gradients of Σα are partial; the counts need none.
        counts, weights = all_reduce_sums((counts, weights), Upstream.PARTIAL)
    # Σ_i Σ_k (Σα)_ck A_ik of each class: over whichever of i and k leaves less to go on with, first.
    if num_classes < len(targets):
        maps = weighted_activations(weights, _sum_by_class(features.to(weights.dtype), targets, num_classes))
    else:
        maps = _sum_by_class(weighted_activations(weights.index_select(0, targets), features), targets, num_classes)
    if over_ranks:
        maps = all_reduce_sum(maps, Upstream.REPLICATED)
    return ClassCams(_mean_maps(maps, counts), counts)
