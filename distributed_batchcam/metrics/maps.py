"""Figures of maps alone: where their relevance lies, how concentrated it is, how alike maps are.

Maps are (N, h, w), not negative; a map of zeros (what a constant map becomes) has no relevance anywhere.
"""

import torch
from torch import Tensor


def relevance_mass(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of a map's relevance inside a mask (Arras et al. 2022, CLEVR-XAI, eq. 1: relevance mass accuracy).

    Σ_{(u,v) ∈ mask} M / Σ_{(u,v)} M.

    Args:
        maps: (N, h, w).
        masks: (N, h, w) bool.

    Returns:
        (N,) in [0, 1]; 0 for a map of zeros, NaN where the mask is empty.
    """
    inside, total = (maps * masks).sum((1, 2)), maps.sum((1, 2))
    shares = torch.where(total > 0, inside / total.clamp(min=torch.finfo(maps.dtype).tiny), 0)
    return shares.masked_fill(~masks.any(2).any(1), torch.nan)


def relevance_rank(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of a map's K most relevant pixels that lie in a mask of K pixels (Arras et al. 2022, eq. 3).

    Pixels that tie for the last places count by their share of these places: the expectation over all orders
    of the tied. Maps after a ReLU tie often.

    Args:
        maps: (N, h, w).
        masks: (N, h, w) bool.

    Returns:
        (N,) in [0, 1]; 0 for a map of zeros, NaN where the mask is empty.
    """
    values, inside = maps.flatten(1), masks.flatten(1)
    sizes = inside.sum(1)
    # The K-th largest value: everything above it is in, what equals it shares the places that are left.
    ordered = values.sort(1, descending=True).values
    last = ordered.gather(1, (sizes - 1).clamp(min=0)[:, None])
    above, tied = values > last, values == last
    places = (sizes - above.sum(1)).to(maps.dtype) / tied.sum(1)
    hits = (above & inside).sum(1) + (tied & inside).sum(1) * places
    ranks = torch.where(values.amax(1) > 0, hits / sizes.clamp(min=1), 0)
    return ranks.masked_fill(sizes == 0, torch.nan)


def gini(maps: Tensor) -> Tensor:
    """Gini index of a map's relevance (Hurley and Rickard 2009; for explanations Chalasani et al. 2020).

    Σ_i (2i - n - 1)·m_i / (n Σ_i m_i) over the n values m_1 ≤ … ≤ m_n: 0 if all are equal, towards 1 if one pixel
    has everything.

    Args:
        maps: (N, h, w).

    Returns:
        (N,) in [0, 1); 0 for a map of zeros.
    """
    ordered = maps.flatten(1).sort(1).values
    count = ordered.shape[1]
    ranks = torch.arange(1, count + 1, device=maps.device, dtype=maps.dtype)
    total = ordered.sum(1)
    spread = ordered @ (2 * ranks - count - 1)
    return torch.where(total > 0, spread / (count * total.clamp(min=torch.finfo(maps.dtype).tiny)), 0)


def unit_maps(maps: Tensor) -> Tensor:
    """(N, h, w) scaled to Euclidean length 1; maps of zeros stay zeros."""
    lengths = maps.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(lengths > 0, maps / lengths.clamp(min=torch.finfo(maps.dtype).tiny), 0)


def consistency(sums: Tensor, nonzero: Tensor, counts: Tensor) -> Tensor:
    """Mean cosine similarity of the maps of a class over all pairs of different images, from sums alone.

    With unit maps u_i: Σ_{i≠j} u_i·u_j / (n(n - 1)) = (|Σ_i u_i|² - n₀) / (n(n - 1)), where n₀ counts the maps that
    are not all zero; a pair with a map of zeros counts as 0. Our own figure: a model that looks for the same
    thing in every image of a class has maps that are alike (where the objects are aligned, as digits are).

    Args:
        sums: (C, h, w), Σ_i u_i per class, see `unit_maps`.
        nonzero: (C,) n₀.
        counts: (C,) n.

    Returns:
        (C,) in [0, 1] up to rounding, NaN for classes of fewer than two images.
    """
    pairs = counts * (counts - 1)
    return torch.where(pairs > 0, (sums.square().sum((1, 2)) - nonzero) / pairs, torch.nan)
