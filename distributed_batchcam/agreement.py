"""What the ranks decide together between two steps, without waiting for the device."""

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

EXCHANGE_SECONDS = 0.5
_MOST_STEPS = 100


class Agreement:
    """Lets all ranks stop, or save, after the same step, although a signal or a clock speaks to one of them only.

    The ranks exchange three integers over gloo on the CPU, in a group of their own: no kernel is launched, the device
    is not waited for, and the training's own collectives are not mixed up with. Nor is it done in every step: each
    exchange says after how many steps the next one is due, so that there are two a second whatever a step takes.
    """

    def __init__(self, accelerator: "Accelerator", timeout: timedelta) -> None:
        self._is_main = accelerator.is_main_process
        self._size = accelerator.num_processes
        # No group means alone.
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=timeout) if self._size > 1 else None
        self._steps, self._next = 0, 1
        self._since = time.monotonic()

    def after_step(self, signal: int, save: bool, *, now: bool) -> tuple[int, bool]:
        """What is to be done after this step, the same on every rank; call it after every step.

        Args:
            signal: number of the signal that this process received, or 0.
            save: whether a checkpoint is due; the main process's answer is the one that counts.
            now: exchange in this step; the same on every rank.

        Returns:
            Number of the signal that some rank received, or 0; whether to save.
        """
        if self._group is None:
            return signal, save
        self._steps += 1
        if self._steps < self._next and not now:
            return 0, False
        seconds = time.monotonic() - self._since
        steps = max(1, min(_MOST_STEPS, int(self._steps * EXCHANGE_SECONDS / max(seconds, 1e-9))))
        flags = torch.tensor([signal, *([save, steps] if self._is_main else [0, 0])])
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self._group)
        signal, save, self._next = flags.tolist()
        self._steps, self._since = 0, time.monotonic()
        return signal, bool(save)

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all ranks, on the main process; None on the others."""
        if self._group is None:
            return [value]
        values = [None] * self._size if self._is_main else None
        torch.distributed.gather_object(value, values, dst=0, group=self._group)
        return values
