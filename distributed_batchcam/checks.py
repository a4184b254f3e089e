"""Shape, type and range checks of the public functions: a `ValueError` that says what is wrong."""

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_features(logits: Tensor, features: Tensor) -> None:
    """Require logits (N, C) and features (N, K, H, W), floating point, of one batch size and device."""
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (N, C), got {tuple(logits.shape)}")
    if features.ndim != 4:
        raise ValueError(f"features must have shape (N, K, H, W), got {tuple(features.shape)}")
    if 0 in features.shape[1:]:
        raise ValueError(f"features must have at least one channel and position, got {tuple(features.shape)}")
    if len(logits) != len(features):
        raise ValueError(f"logits are of {len(logits)} samples, features of {len(features)}")
    if not (logits.is_floating_point() and features.is_floating_point()):
        raise ValueError(f"logits and features must be floating point, got {logits.dtype}, {features.dtype}")


def check_targets(targets: Tensor, samples: int, num_classes: int, *, values: bool = True) -> None:
    """Require integer targets (N,); with `values`, each within 0 … num_classes - 1."""
    if targets.shape != (samples,):
        raise ValueError(f"targets must have shape ({samples},), got {tuple(targets.shape)}")
    if targets.dtype not in _INTEGERS:
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    if values and samples and not bool(((targets >= 0) & (targets < num_classes)).all()):
        low, high = int(targets.min()), int(targets.max())
        raise ValueError(f"targets must lie in 0 … {num_classes - 1}, got values from {low} to {high}")


def check_prototypes(prototypes: Tensor) -> None:
    """Require floating-point prototypes (C, h, w), finite and within [0, 1]."""
    if prototypes.ndim != 3 or 0 in prototypes.shape:
        raise ValueError(f"prototypes must have shape (C, h, w), got {tuple(prototypes.shape)}")
    if not prototypes.is_floating_point():
        raise ValueError(f"prototypes must be floating point, got {prototypes.dtype}")
    if not bool(((prototypes >= 0) & (prototypes <= 1)).all()):
        raise ValueError("prototypes must lie in [0, 1] and be finite; scale them first")
