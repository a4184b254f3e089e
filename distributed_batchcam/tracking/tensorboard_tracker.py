"""TensorBoard event files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from distributed_batchcam.config import RunConfig

from .tracker import Picture, Value, numbers_of, options_of


class TensorBoardTracker:
    """Event files under RUN_DIR/tensorboard."""

    def __init__(self, config: RunConfig, run_dir: Path, last_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a resumed run does again is hidden where it was logged the first time.
        self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=None if last_step is None else last_step + 1)
        if last_step is None:
            options = yaml.safe_dump(options_of(config), sort_keys=False)
            self._writer.add_text("config", "".join(f"    {line}\n" for line in options.splitlines()))

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        for name, value in numbers_of(metrics).items():
            self._writer.add_scalar(name, value, step)

    def show(self, name: str, picture: Picture, caption: str, step: int) -> None:
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def finish(self, summary: Mapping[str, Value], files: Sequence[Path]) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
