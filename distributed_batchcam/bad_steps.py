"""Steps whose gradient is not finite: skipped on the device, counted, and named afterwards."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .data import Batch
from .runtime import float_buffers
from .training_state import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from .agreement import Agreement

logger = logging.getLogger(__name__)

RECORD = "bad_steps.jsonl"


class BadSteps:
    """Keeps weights, their average and running statistics free of a gradient that is not finite.

    The decision is made and carried out on the device. The fused optimizers take a tensor `found_inf`, made for loss
    scaling, and where it is 1 they change nothing: nobody has to wait for the device to know. What was skipped is
    read where the training waits anyway, at log lines and checkpoints. The gradient is the same on every rank, so
    all of them skip, count and stop alike.

    Under fp16 the scaler does the skipping, and finds the right scale by it: such steps are counted and no more.

    Args:
        accelerator, agreement: of the ranks.
        optimizer: the prepared one, of fused kernels.
        model: whose running statistics a bad batch must not get into.
        limit: skipped steps in a row that a run survives.
        folder: the run directory, where the samples of skipped steps are noted.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        agreement: "Agreement",
        optimizer: "AcceleratedOptimizer",
        model: nn.Module,
        limit: int,
        folder: Path,
    ) -> None:
        self._agreement = agreement
        self._optimizer = optimizer.optimizer
        self._scaled = accelerator.scaler is not None
        self._buffers = list(float_buffers(model).values())
        self._before: list[Tensor] = []
        self._limit = limit
        self._folder = folder
        self._flags: list[Tensor] = []  # of the steps since the last check, on the device
        self._samples: list[list[Tensor]] = [[]]  # of each of them, by piece, on the CPU

    def before_forward(self, batch: Batch) -> None:
        """Note the samples of a piece of the step, and the running statistics before its first one."""
        if not self._samples[-1] and self._buffers:
            self._before = [buffer.clone() for buffer in self._buffers]
        self._samples[-1].append(batch.indices)

    def before_step(self, norm: Tensor) -> None:
        """Let the optimizer's step change nothing if the norm of the gradient, a scalar, is not finite."""
        bad = ~norm.isfinite()
        self._flags.append(bad)
        self._samples.append([])
        if not self._scaled:
            self._optimizer.found_inf = bad.float()
        for buffer, before in zip(self._buffers, self._before, strict=True):
            torch.where(bad, before, buffer, out=buffer)

    def check(self, progress: Progress) -> None:
        """Count what was skipped since the last check; waits for the device, and every rank must call it.

        Raises:
            FloatingPointError: too many in a row.
        """
        if not self._flags:
            return
        flags = torch.stack(self._flags).tolist()
        steps = range(progress.step - len(flags) + 1, progress.step + 1)
        skipped = {
            step: torch.cat(pieces) for step, bad, pieces in zip(steps, flags, self._samples, strict=False) if bad
        }
        self._flags, self._samples = [], [[]]
        if skipped and not self._scaled:
            self._record(progress, skipped)
        for step in steps:
            progress.skipped_in_row = progress.skipped_in_row + 1 if step in skipped else 0
            if progress.skipped_in_row > self._limit and not self._scaled:
                raise FloatingPointError(
                    f"the gradient is not finite in {progress.skipped_in_row} steps in a row, up to step {step}; their "
                    f"samples are in {self._folder / RECORD}: lower --lr or --weight, or set --clip-norm"
                )
        progress.skipped_steps += len(skipped)

    def _record(self, progress: Progress, skipped: dict[int, Tensor]) -> None:
        ranks = self._agreement.gather(skipped)
        if ranks is None:
            return
        lines = [
            {"step": step, "epoch": progress.epoch + 1, "samples": torch.cat([rank[step] for rank in ranks]).tolist()}
            for step in skipped
        ]
        try:
            with (self._folder / RECORD).open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._folder / RECORD, error.strerror or error)
