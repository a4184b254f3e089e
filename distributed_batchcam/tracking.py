"""Where metrics go: metrics.jsonl always, W&B or TensorBoard besides.

metrics.jsonl is the truth. A tracker that cannot be had or fails costs one warning, never the training.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from .checkpoint import write_atomic
from .config import RunConfig

logger = logging.getLogger(__name__)

Value = str | int | float | None


class Tracker(Protocol):
    """A place that metrics are sent to."""

    def log(self, metrics: Mapping[str, Value], step: int) -> None: ...

    def finish(self, summary: Mapping[str, Value]) -> None: ...


class MetricsFile:
    """metrics.jsonl: one JSON object a line, on disk as soon as it is logged."""

    def __init__(self, path: Path, last_step: int | None = None) -> None:
        """Append to `path`; a resumed run drops what was logged after `last_step`, as it does those steps again."""
        if last_step is not None and path.exists():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= last_step]
            write_atomic(path, "".join(line + "\n" for line in lines).encode())
        self._file = path.open("a", buffering=1)

    def log(self, metrics: Mapping[str, Value]) -> None:
        self._file.write(json.dumps(metrics) + "\n")

    def close(self) -> None:
        self._file.close()


class WandbTracker:
    """Weights & Biases; works offline (WANDB_MODE=offline) and without a login says so once."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        import wandb

        options = config.model_dump(mode="json", exclude={"data_root", "out", "prototypes", "pretrained"})
        self._run = wandb.init(project="batchcam", name=run_dir.name, dir=run_dir, config=options)

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        self._run.log({key: value for key, value in metrics.items() if not isinstance(value, str)}, step=step)

    def finish(self, summary: Mapping[str, Value]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish()


class TensorBoardTracker:
    """Event files under RUN_DIR/tensorboard."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run_dir / "tensorboard")

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        for key, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)

    def finish(self, summary: Mapping[str, Value]) -> None:
        self._writer.close()


TRACKERS: dict[str, Callable[[RunConfig, Path], Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
}


class SafeTracker:
    """Guards training against its tracker: the first failure is one warning, after which the tracker is left."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        self._name = config.tracker
        self._tracker: Tracker | None = None
        if config.tracker != "none":
            self._attempt(lambda: setattr(self, "_tracker", TRACKERS[config.tracker](config, run_dir)))

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        if (tracker := self._tracker) is not None:
            self._attempt(lambda: tracker.log(metrics, step))

    def finish(self, summary: Mapping[str, Value]) -> None:
        if (tracker := self._tracker) is not None:
            self._attempt(lambda: tracker.finish(summary))

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker and its network come up with
            self._tracker = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("tracker %s failed (%s); training goes on, metrics.jsonl has everything", self._name, reason)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a crash cut off: what it would have said is done again
