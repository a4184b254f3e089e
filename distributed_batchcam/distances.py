"""Distances between maps in [0, 1]: each takes (N, h, w) twice and returns (N,).

To add one: write the function and give it a line in `DISTANCES`; the objectives `pl_NAME` and
`bcpl_NAME` exist from then on.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # (K·L)² of Wang et al. 2004 with data range L = 1


def l1_distance(maps: Tensor, prototypes: Tensor) -> Tensor:
    """mean_{u,v} |M - P|: (N, h, w) twice to (N,)."""
    return (maps - prototypes).abs().mean((1, 2))


def l2_distance(maps: Tensor, prototypes: Tensor) -> Tensor:
    """mean_{u,v} (M - P)²: (N, h, w) twice to (N,)."""
    return (maps - prototypes).square().mean((1, 2))


def ssim_distance(maps: Tensor, prototypes: Tensor, exponents: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Tensor:
    """1 - SSIM(M, P): (N, h, w) twice to (N,)."""
    return 1 - ssim(maps, prototypes, exponents)


DISTANCES: dict[str, Distance] = {"l1": l1_distance, "l2": l2_distance, "ssim": ssim_distance}


def ssim(x: Tensor, y: Tensor, exponents: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Tensor:
    """Structural similarity, data range 1 (paper, eq. 6-9; Wang et al. 2004, eq. 6-12).

    SSIM = mean_{u,v} l^α·c^β·s^γ over Gaussian windows (11 pixels, σ = 1.5, no padding) with
    l = (2μ_xμ_y + C1)/(μ_x² + μ_y² + C1), c = (2σ_xσ_y + C2)/(σ_x² + σ_y² + C2),
    s = (σ_xy + C2/2)/(σ_xσ_y + C2/2). The window shrinks to the largest odd size that fits a small map.

    Args:
        x, y: (N, h, w) in [0, 1].
        exponents: (α, β, γ), each ≥ 0. l and s can be negative, where a power that is not a whole
            number has no real value: their bases are then cut off at 0.

    Returns:
        (N,), at most 1.

    Raises:
        ValueError: shapes that differ, or a negative exponent.
    """
    if x.shape != y.shape or x.ndim != 3:
        raise ValueError(f"maps must have one shape (N, h, w) in common, got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(exponents) < 0:
        raise ValueError(f"SSIM exponents must not be negative, got {exponents}")
    with torch.autocast(x.device.type, enabled=False):
        x, y = _same_dtype(x, y)
        moments = _blur(torch.stack([x, y, x * x, y * y, x * y], 1))
        return _similarity(exponents, *moments.unbind(1))


def ssim_to_each(maps: Tensor, prototypes: Tensor) -> Tensor:
    """`ssim` of every map (N, h, w) and every prototype (C, h, w), as (N, C); what belongs to one is blurred once."""
    with torch.autocast(maps.device.type, enabled=False):
        x, y = _same_dtype(maps, prototypes)
        mean_x, mean_xx = _blur(torch.stack([x, x * x], 1)).unbind(1)
        mean_y, mean_yy = _blur(torch.stack([y, y * y], 1)).unbind(1)
        mean_xy = _blur(x[:, None] * y[None])
        return _similarity((1, 1, 1), mean_x[:, None], mean_y[None], mean_xx[:, None], mean_yy[None], mean_xy)


def _same_dtype(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(dtype)


def _similarity(
    exponents: tuple[float, float, float],
    mean_x: Tensor,
    mean_y: Tensor,
    mean_xx: Tensor,
    mean_yy: Tensor,
    mean_xy: Tensor,
) -> Tensor:
    """SSIM from the blurred moments (…, h, w) of two maps, mean over (h, w)."""
    alpha, beta, gamma = exponents
    var_x, var_y = mean_xx - mean_x.square(), mean_yy - mean_y.square()
    cov = mean_xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x.square() + mean_y.square() + SSIM_C1)
    # c·s in closed form: the σ_xσ_y of c's numerator and s's denominator cancel, since C3 = C2/2.
    contrast_structure = (2 * cov + SSIM_C2) / (var_x + var_y + SSIM_C2)
    value = _power(luminance, alpha) * _power(contrast_structure, gamma)
    if beta != gamma:
        # √ has an infinite slope at 0, where flat regions (a CAM's zeros) lie. Variances within rounding
        # error of 0 count as 0, without a gradient; the inner `where` keeps the root's NaN out of it.
        textured = torch.minimum(var_x, var_y) > 4 * torch.finfo(mean_x.dtype).eps
        product = torch.where(textured, var_x * var_y, torch.ones_like(var_x))
        deviations = torch.where(textured, product.sqrt(), torch.zeros_like(product))
        contrast = (2 * deviations + SSIM_C2) / (var_x + var_y + SSIM_C2)
        value = value * contrast.pow(beta - gamma)
    return value.mean((-2, -1))


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize (half-pixel centres) of (N, H, W) to (N, *size)."""
    if maps.shape[1:] == size:
        return maps
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False).squeeze(1)


def _power(base: Tensor, exponent: float) -> Tensor:
    if exponent == 1:
        return base
    return base.pow(exponent) if float(exponent).is_integer() else base.clamp(min=0).pow(exponent)


def _blur(maps: Tensor) -> Tensor:
    """Valid (unpadded) separable Gaussian blur of (N, M, h, w)."""
    # Depthwise, M > 1: cuDNN's TF32, on by default for other convolutions, would swamp small variances.
    kinds, height, width = maps.shape[1:]
    vertical = _gaussian(_largest_odd(height), maps.dtype, maps.device)
    horizontal = _gaussian(_largest_odd(width), maps.dtype, maps.device)
    blurred = F.conv2d(maps, vertical.view(1, 1, -1, 1).expand(kinds, -1, -1, -1), groups=kinds)
    return F.conv2d(blurred, horizontal.view(1, 1, 1, -1).expand(kinds, -1, -1, -1), groups=kinds)


def _largest_odd(size: int) -> int:
    return min(SSIM_WINDOW, size if size % 2 else size - 1)


# Compiled code takes the tensor as it is: traced, it would be made on the CPU and copied in every step.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _gaussian(window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _make_gaussian(window, dtype, device)


@lru_cache(maxsize=32)
def _make_gaussian(window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    offsets = torch.arange(window, dtype=torch.float64) - window // 2
    weights = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    return (weights / weights.sum()).to(device, dtype)
