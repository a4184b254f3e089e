"""When a checkpoint is due, and its writing beside the training."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .checkpoint import Packed, pack
from .config import Interval
from .run_directory import RunDirectory
from .training_state import Progress


class CheckpointSchedule:
    """Says after which steps and epochs a checkpoint is due."""

    def __init__(self, interval: Interval) -> None:
        self._interval = interval
        self.by_clock = interval.unit == "s"
        self._since = time.monotonic()

    def after_step(self, progress: Progress) -> bool:
        """Whether one is due within an epoch. By steps all ranks find the same; by the clock, ask the main process."""
        amount, unit = self._interval
        if unit == "s":
            return time.monotonic() - self._since >= amount
        return unit == "step" and progress.step % amount == 0

    def after_epoch(self, progress: Progress) -> bool:
        """Whether one is due at the end of an epoch; the best epoch and the last are saved in any case."""
        amount, unit = self._interval
        return progress.epoch % amount == 0 if unit == "epoch" else self.after_step(progress)

    def saved(self) -> None:
        """Count the seconds to the next from here."""
        self._since = time.monotonic()


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time.

    The state is copied before `save` returns, so training may go on; hashing, writing and fsync let other threads
    run. One that cannot be written (a full disk, a folder that is gone) costs a warning: training goes on and the
    next one is tried, while those before stay as they are.
    """

    def __init__(self, run_dir: RunDirectory, newest: int, warn: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._newest = newest
        self._warn = warn
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self.failed = False  # the last one could not be written

    def save(self, name: str, state: dict[str, Any], best_epoch: int) -> None:
        """Begin to write a checkpoint, after the one before is done."""
        packed = pack(state)
        self.wait()
        self._writing = self._thread.submit(self._write, name, packed, best_epoch)

    def wait(self) -> None:
        """Return when nothing is being written any more; raises what the thread met but full disks and the like."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Let a write that has begun come to its end."""
        self._thread.shutdown(wait=True)

    def _write(self, name: str, packed: Packed, best_epoch: int) -> None:
        try:
            self._run_dir.write_checkpoint(name, packed, best_epoch=best_epoch, newest=self._newest)
            self.failed = False
        except OSError as error:
            self.failed = True
            self._warn(
                f"checkpoint {name} could not be written ({error.strerror or error}): training goes on, earlier "
                f"checkpoints are as they were, the next one is tried again"
            )
