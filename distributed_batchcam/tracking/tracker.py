"""What a tracker is, and what trackers are told of a run's options and metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distributed_batchcam.config import RunConfig

Value = str | int | float | None
Picture = NDArray[np.uint8]  # (H, W, 3)


class Tracker(Protocol):
    """A place that metrics are sent to."""

    def log(self, metrics: Mapping[str, Value], step: int) -> None: ...

    def show(self, name: str, picture: Picture, caption: str, step: int) -> None: ...

    def finish(self, summary: Mapping[str, Value], files: Sequence[Path]) -> None: ...

    def close(self) -> None:
        """Called last, whether or not the run was finished or the tracker failed."""


def options_of(config: RunConfig) -> dict[str, Any]:
    """The options without where things lie on this machine, and without what the tracker knows already."""
    known = {"data_root", "out", "resume", "tracker", "group", "tags"}
    files = {name: bool(getattr(config, name)) for name in ("prototypes", "pretrained")}
    return {**config.model_dump(mode="json", exclude=known), **files}


def numbers_of(metrics: Mapping[str, Value]) -> dict[str, float]:
    """The metrics that are numbers."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
