"""Training figures between two log lines, kept on the device."""

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data import Batch
from .objectives import LossParts

if TYPE_CHECKING:
    from accelerate import Accelerator


class Meter:
    """Averages loss parts on the device; reading it is one all-reduce and one wait for the device."""

    def __init__(self, accelerator: "Accelerator") -> None:
        self._accelerator = accelerator
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(4, device=self._accelerator.device)
        self._pieces = 0
        self._images = 0
        self._since = time.perf_counter()

    def add(self, step: tuple[LossParts, Tensor], batch: Batch) -> None:
        """Add what a training step returned."""
        parts, right = step
        self._sums += torch.stack([*parts, right.to(parts.total.dtype)])
        self._pieces += 1
        self._images += batch.batch_size

    def read(self) -> dict[str, Any]:
        """Averages since the last reading, over all ranks, and the rate."""
        # The parts are scaled for an average over ranks; the count of right predictions adds up.
        total, classification, cam, right = self._accelerator.reduce(self._sums, "sum").tolist()
        shares = self._pieces * self._accelerator.num_processes
        seconds = time.perf_counter() - self._since
        figures = {
            "loss": total / shares,
            "loss_class": classification / shares,
            "loss_cam": cam / shares,
            "accuracy": 100 * right / self._images,
            "images_per_second": self._images / seconds,
            "images": self._images,
            "seconds": seconds,
        }
        self._reset()
        return figures
