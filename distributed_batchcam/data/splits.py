"""Deterministic choices of images: stratified splits, and small selections for a debug run."""

import torch
from torch import Tensor

from distributed_batchcam.errors import InputError

# Splits belong to the data, not to a run: the same images are held out whatever the run's seed is.
SPLIT_SEED = 0


def stratified_split(
    targets: Tensor, size: int, classes: tuple[str, ...], part: str, remedy: str
) -> tuple[Tensor, Tensor]:
    """Hold out `size` images, of each class in proportion and at least one, and leave at least one.

    Args:
        targets: (N,) classes.
        size: number of images to hold out.
        classes: names of the C classes.
        part: what the held-out images are called in messages.
        remedy: what else the user could do, where a class has too few.

    Returns:
        Positions (N - size,) of the rest and (size,) of the held-out images, each in ascending order.

    Raises:
        InputError: a class with fewer than two images, or a `size` outside C … N - C.
    """
    counts = torch.bincount(targets, minlength=len(classes))
    for name, count in zip(classes, counts.tolist(), strict=True):
        if count < 2:
            raise InputError(
                f"class {name!r} has {count} image(s), too few to hold one out for {part}; add some, or {remedy}"
            )
    least, most = len(classes), len(targets) - len(classes)
    if not least <= size <= most:
        raise InputError(
            f"{size} {part} images cannot be held out of {len(targets)} of {len(classes)} classes; "
            f"choose from {least} to {most}"
        )
    shuffle = torch.randperm(len(targets), generator=torch.Generator().manual_seed(SPLIT_SEED))
    by_class = shuffle[targets[shuffle].argsort(stable=True)]
    held_out = _places(counts) < _quotas(counts, size).repeat_interleave(counts)
    return by_class[~held_out].sort().values, by_class[held_out].sort().values


def balanced_selection(targets: Tensor, limit: int) -> Tensor:
    """Positions, ascending, of at most `limit` images: the first of every class, then the second, …"""
    by_class = targets.argsort(stable=True)
    rounds = _places(torch.bincount(targets)).argsort(stable=True)
    return by_class[rounds[:limit]].sort().values


def random_selection(targets: Tensor, per_class: int, classes: tuple[str, ...], seed: int = 0) -> Tensor:
    """Positions, ascending, of `per_class` images of every class, drawn at random.

    Raises:
        InputError: a class with fewer.
    """
    counts = torch.bincount(targets, minlength=len(classes))
    for name, count in zip(classes, counts.tolist(), strict=True):
        if count < per_class:
            raise InputError(f"class {name!r} has {count} image(s), not {per_class}; choose fewer")
    shuffle = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    by_class = shuffle[targets[shuffle].argsort(stable=True)]
    return by_class[_places(counts) < per_class].sort().values


def _places(counts: Tensor) -> Tensor:
    """0, 1, …, n_c - 1 for each class in turn: the place of an image in its class, sorted by class."""
    starts = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) - starts.repeat_interleave(counts)


def _quotas(counts: Tensor, size: int) -> Tensor:
    """How many of each class make up `size`: proportional, but at least 1 and at most n_c - 1."""
    exact = size * counts.double() / counts.sum()
    quotas = torch.minimum(exact.long().clamp(min=1), counts - 1)
    while missing := size - int(quotas.sum()):
        # Those furthest from their proportion give or take one each, until the sum is right.
        need, movable = (exact - quotas, quotas < counts - 1) if missing > 0 else (quotas - exact, quotas > 1)
        order = need.masked_fill(~movable, -torch.inf).argsort(descending=True, stable=True)
        chosen = order[: min(abs(missing), int(movable.sum()))]
        quotas[chosen] += 1 if missing > 0 else -1
    return quotas
