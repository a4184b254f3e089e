"""Training figures between two log lines, kept on the device."""

import math
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
        self._sums = torch.zeros(5, device=self._accelerator.device)
        self._images = 0
        self._seconds = 0.0
        self.start()

    def start(self) -> None:
        """Let the clock go on."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock, for what is not training."""
        self._seconds += time.perf_counter() - self._since
        self.start()

    def add(self, step: tuple[LossParts, Tensor], batch: Batch) -> None:
        """Add what a training step returned."""
        parts, right = step
        losses = torch.stack([*parts])
        # A step that was skipped must not spoil the average of the others.
        finite = losses.isfinite().all()
        self._sums += torch.stack([*torch.where(finite, losses, 0.0), right.to(losses.dtype), finite.to(losses.dtype)])
        self._images += batch.batch_size

    def read(self) -> dict[str, Any]:
        """Averages since the last reading, over all ranks, and the rate; losses are NaN where none was finite."""
        # The parts are scaled for an average over ranks; the count of right predictions adds up.
        total, classification, cam, right, finite = self._accelerator.reduce(self._sums, "sum").tolist()
        shares = finite or math.nan
        self.pause()
        seconds = self._seconds
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

    def state(self) -> dict[str, Any]:
        """What this rank has added since the last reading."""
        self.pause()
        return {
            "sums": self._sums.cpu(),
            "images": self._images,
            "seconds": self._seconds,
        }

    def put_back(self, ranks: list[dict[str, Any]]) -> None:
        """Go on from the `state` of each rank, of any number of them."""
        size, rank = self._accelerator.num_processes, self._accelerator.process_index
        if len(ranks) == size:
            sums = ranks[rank]["sums"]
        else:
            # One rank takes it all. The parts are for an average over ranks, of which there were others.
            sums = torch.stack([one["sums"] for one in ranks]).sum(0) * (rank == 0)
            sums[:3] *= size / len(ranks)
            sums[4] *= size / len(ranks)
        self._sums.copy_(sums)
        self._images, self._seconds = ranks[0]["images"], ranks[0]["seconds"]
