"""metrics.jsonl: the metrics of a run, whatever becomes of other trackers."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from distributed_batchcam.checkpoint import write_atomic

from .tracker import Value


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


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a crash cut off: what it would have said is done again
