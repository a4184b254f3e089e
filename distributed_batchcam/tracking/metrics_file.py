"""metrics.jsonl: the metrics of a run, whatever becomes of other trackers."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from distributed_batchcam.checkpoint import write_atomic

from .tracker import Value

logger = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl: one JSON object a line, on disk as soon as it is logged.

    The lines are kept in memory too, for checkpoints, and for a disk that is full or a folder that is gone: that costs
    one warning, and once lines can be written again the file gets all of them.
    """

    def __init__(self, path: Path, lines: Sequence[str] = ()) -> None:
        """Begin `path` anew with the lines of the checkpoint that a run goes on from.

        What else it held is of steps that are done again.
        """
        self._path = path
        self.lines = list(lines)
        self._file: TextIO | None = None
        self._warned = False
        write_atomic(path, self._content())

    def log(self, metrics: Mapping[str, Value]) -> None:
        line = json.dumps(metrics)
        self.lines.append(line)
        try:
            if self._file is None or not self._path.exists():
                self._begin()
            else:
                self._file.write(f"{line}\n")
            self._warned = False
        except OSError as error:
            self._leave()
            if not self._warned:
                logger.warning(
                    "%s cannot be written (%s): training goes on, its lines are kept for later",
                    self._path,
                    error.strerror or error,
                )
            self._warned = True

    def complete(self) -> None:
        """Write what could not be written before.

        Raises:
            OSError: it still cannot be.
        """
        if self._warned or not self._path.exists():
            self._begin()
            self._warned = False

    def close(self) -> None:
        self._leave()

    def _begin(self) -> None:
        """Write all lines, then append."""
        write_atomic(self._path, self._content())
        self._file = self._path.open("a", buffering=1)

    def _leave(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what it still held is in `lines`
                file.close()

    def _content(self) -> bytes:
        return "".join(f"{line}\n" for line in self.lines).encode()
