"""Where metrics go: metrics.jsonl always, W&B or TensorBoard besides.

metrics.jsonl is the truth. A tracker that cannot be had or fails costs one warning, never the training.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from distributed_batchcam.config import RunConfig

from .metrics_file import MetricsFile
from .panel import class_panel, panel_caption
from .tensorboard_tracker import TensorBoardTracker
from .tracker import Tracker, Value
from .wandb_tracker import WandbTracker

__all__ = ["ARTIFACTS", "TRACKERS", "MetricsFile", "SafeTracker"]

logger = logging.getLogger(__name__)

ARTIFACTS = (
    *("config.yaml", "summary.json", "model.safetensors", "prototypes.safetensors", "class_maps-test.png"),
    *("evaluation-test.json", "report.html"),
)
"""What a finished run leaves with a tracker that keeps files."""

TRACKERS: dict[str, Callable[[RunConfig, Path, int | None], Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
}


class SafeTracker:
    """Guards training against its tracker: the first failure is one warning, after which the tracker is left."""

    def __init__(self, config: RunConfig, run_dir: Path, last_step: int | None = None) -> None:
        """Start the tracker of a run; `last_step` is of the checkpoint that a resumed run goes on from."""
        self._name = config.tracker
        self._tracker: Tracker | None = None
        self._failed = False
        if config.tracker != "none":
            self._attempt(lambda: setattr(self, "_tracker", TRACKERS[config.tracker](config, run_dir, last_step)))

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        """Send figures, named by split: train/loss."""
        if (tracker := self._working()) is not None:
            self._attempt(lambda: tracker.log(metrics, step))

    def show_class_maps(self, prototypes: Tensor, maps: Tensor, classes: Sequence[str], step: int) -> None:
        """Send a picture of prototypes (C, h, w) against class maps (C, h, w), both in [0, 1]."""
        if (tracker := self._working()) is not None:
            self._attempt(
                lambda: tracker.show("valid/class_maps", class_panel(prototypes, maps), panel_caption(classes), step)
            )

    def finish(self, summary: Mapping[str, Value], run_dir: Path) -> None:
        """Send what a finished run leaves."""
        if (tracker := self._working()) is not None:
            files = [run_dir / name for name in ARTIFACTS if (run_dir / name).is_file()]
            self._attempt(lambda: tracker.finish(summary, files))

    def close(self) -> None:
        """End the tracker, however the run ended."""
        if (tracker := self._tracker) is not None:
            self._tracker = None
            self._attempt(tracker.close)

    def _working(self) -> Tracker | None:
        return None if self._failed else self._tracker

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker and its network come up with
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if not self._failed:
                logger.warning(
                    "tracker %s failed (%s); training goes on, metrics.jsonl has everything", self._name, reason
                )
            self._failed = True
