"""What --debug watches, and its verdict."""

import torch
from torch import Tensor, nn

from .models import CAMOutput
from .objectives import LossParts


class DebugMonitor:
    """Watches every step of a short run: losses, gradients, shapes. Slow, and meant to be."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._without_gradient = set(self._parameters)
        self._not_finite: set[str] = set()
        self._losses: list[float] = []

    def after_backward(self, images: Tensor, output: CAMOutput, parts: LossParts) -> None:
        """Look at one step; the first one's shapes are printed."""
        if not self._losses:
            shapes = f"{_shape(images)} -> features {_shape(output.features)} -> logits {_shape(output.logits)}"
            print(f"debug: images {shapes}")
        self._losses.append(float(parts.total.detach()))
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if not bool(torch.isfinite(gradient).all()):
                self._not_finite.add(name)
            elif bool(gradient.any()):
                self._without_gradient.discard(name)

    def verdict(self) -> bool:
        """Print what was found; True if all is well."""
        quarter = max(1, len(self._losses) // 4)
        first, last = sum(self._losses[:quarter]) / quarter, sum(self._losses[-quarter:]) / quarter
        checks = [
            (last < first, f"the loss fell from {first:.4f} to {last:.4f} (means of the first and last quarter)"),
            (not self._not_finite, "all gradients are finite" + _listing("not in", self._not_finite)),
            (not self._without_gradient, "every parameter gets a gradient" + _listing("not", self._without_gradient)),
        ]
        for passed, what in checks:
            print(f"debug: {'ok    ' if passed else 'FAILED'} {what}")
        return all(passed for passed, _ in checks)


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listing(word: str, names: set[str]) -> str:
    return f", {word}: {', '.join(sorted(names))}" if names else ""
