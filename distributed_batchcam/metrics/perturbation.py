"""Figures of what happens when an image is changed: by its own map, pixel by pixel, or by a little noise.

The baseline that stands for "nothing there" is the black pixel: 0 before normalisation.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Probabilities = Callable[[Tensor], Tensor]
"""Images (N, ch, h, w) in [0, 1] to class probabilities (N, C)."""
Explain = Callable[[Tensor, Tensor], Tensor]
"""Images (N, ch, h, w) in [0, 1] and classes (N,) to maps (N, h, w)."""

_IMAGES_AT_A_TIME = 512  # unless there are more


def confidence_change(
    probabilities: Probabilities, images: Tensor, maps: Tensor, classes: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Average drop and increase in confidence, per image (Chattopadhay et al. 2018, Grad-CAM++, section 4.1).

    With p the probability of class c and the image darkened by its map, M ⊙ x (black where the map is 0):
    drop = max(0, p(x) - p(M ⊙ x)) / p(x), increase = [p(M ⊙ x) > p(x)].

    Args:
        probabilities: the model.
        images: (N, ch, h, w) in [0, 1].
        maps: (N, h, w) in [0, 1].
        classes: (N,) class c of each image.
        before: (N,) p(x).

    Returns:
        Drop (N,) in [0, 1] and increase (N,), 0 or 1.
    """
    after = _of_class(probabilities(images * maps[:, None]), classes)
    return (before - after).clamp(min=0) / before.clamp(min=torch.finfo(before.dtype).tiny), (after > before).to(before)


def deletion_insertion(
    probabilities: Probabilities, images: Tensor, maps: Tensor, classes: Tensor, steps: int = 20
) -> tuple[Tensor, Tensor]:
    """Areas under the deletion and the insertion curve, per image (causal metrics of RISE, Petsiuk et al. 2018).

    Pixels are blackened (deletion) or put into a black image (insertion) from the most to the least relevant
    (ties: in order of position), a share of 1/steps at a time; the curve is the probability of class c over the
    share of pixels, its area by the trapezoidal rule.

    Args:
        probabilities: the model.
        images: (N, ch, h, w) in [0, 1].
        maps: (N, h, w).
        classes: (N,) class c of each image.
        steps: how many times pixels are changed.

    Returns:
        Deletion AUC and insertion AUC, each (N,) in [0, 1].
    """
    count, pixels = len(images), maps.shape[1] * maps.shape[2]
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(pixels, device=maps.device).expand_as(order))
    ranks = ranks.view(count, 1, *maps.shape[1:])
    size = -(-pixels // steps)
    changed = torch.tensor([*range(0, pixels, size), pixels], device=maps.device)
    points_at_a_time = max(1, _IMAGES_AT_A_TIME // max(1, count))

    def area(insert: bool) -> Tensor:
        values = []
        for some in changed.split(points_at_a_time):
            relevant = ranks < some.view(-1, 1, 1, 1, 1)  # (points, N, 1, h, w): those changed so far
            shown = (images * (relevant if insert else ~relevant)).flatten(0, 1)
            values.append(_of_class(probabilities(shown), classes.repeat(len(some))).view(len(some), count))
        curve = torch.cat(values)
        return torch.trapezoid(curve, changed.to(curve) / pixels, dim=0)

    return area(insert=False), area(insert=True)


def sensitivity(
    explain: Explain, images: Tensor, maps: Tensor, classes: Tensor, noises: Iterable[Tensor], radius: float
) -> Tensor:
    """Average sensitivity of the map to small noise, per image (Bhatt et al. 2020; Yeh et al. 2019 take the maximum).

    mean over draws of ‖M(x + r·ε) - M(x)‖ / ‖M(x)‖ with ε uniform in [-1, 1] per value. Where M(x) is all zeros,
    a draw counts 0 if the map stays so, otherwise 1.

    Args:
        explain: the maps of the model.
        images: (N, ch, h, w) in [0, 1].
        maps: (N, h, w), the maps of `images`.
        classes: (N,) class that is explained.
        noises: ε, (N, ch, h, w) for each draw.
        radius: r, in units of the images' range [0, 1].

    Returns:
        (N,)
    """
    lengths = maps.flatten(1).norm(dim=1)
    changes = []
    for noise in noises:
        distances = (explain(images + radius * noise, classes) - maps).flatten(1).norm(dim=1)
        ratios = distances / lengths.clamp(min=torch.finfo(maps.dtype).tiny)
        changes.append(torch.where(lengths > 0, ratios, (distances > 0).to(ratios)))
    return torch.stack(changes).mean(0)


def _of_class(probabilities: Tensor, classes: Tensor) -> Tensor:
    return probabilities.gather(1, classes[:, None])[:, 0]
