"""When a checkpoint is due, and its writing beside the training."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .checkpoint import Packed, pack
from .config import Interval
from .errors import InUseError, RunFault
from .run_directory import RunDirectory
from .training_state import Progress

RETRY_SECONDS = 2.0


def keep_trying(write: Callable[[], None], what: str, seconds: float, warn: Callable[[str], None]) -> None:
    """Write the last files of a run, waiting for a disk that is full or gone: there is no next time for them.

    Raises:
        RunFault: it did not come back in that time.
    """
    deadline, warned = time.monotonic() + seconds, False
    while True:
        try:
            return write()
        except (OSError, InUseError) as error:
            reason = f"{what} cannot be written ({_why(error)})"
            if time.monotonic() > deadline:
                raise RunFault(f"{reason}; once it can, --resume auto ends the run") from error
            if not warned:
                warn(f"{reason}: make room or bring the folder back, it is tried again for {seconds:.0f} s")
                warned = True
            time.sleep(RETRY_SECONDS)


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


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
    run. One that cannot be written (a full disk, a folder that is gone or another run's) costs a warning: training
    goes on and the next one is tried, while those before stay as they are.
    """

    def __init__(self, run_dir: RunDirectory, newest: int, warn: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._newest = newest
        self._warn = warn
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._unwritten: tuple[str, Packed, int] | None = None  # the last one, if it could not be written

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

    def insist(self, seconds: float) -> bool:
        """Try the last one again for a while if it could not be written; returns whether it is on disk."""
        self.wait()
        deadline = time.monotonic() + seconds
        while self._unwritten is not None and time.monotonic() < deadline:
            time.sleep(RETRY_SECONDS)
            self._write(*self._unwritten)
        return self._unwritten is None

    def close(self) -> None:
        """Let a write that has begun come to its end."""
        self._thread.shutdown(wait=True)

    def _write(self, name: str, packed: Packed, best_epoch: int) -> None:
        try:
            self._run_dir.write_checkpoint(name, packed, best_epoch=best_epoch, newest=self._newest)
            self._unwritten = None
        except (OSError, InUseError) as error:
            if self._unwritten is None:
                self._warn(
                    f"checkpoint {name} could not be written ({_why(error)}): training goes on, earlier "
                    "checkpoints are as they were; it is tried again with each one that is due"
                )
            self._unwritten = (name, packed, best_epoch)
