"""The run directory: which one, what is in it, and whether a run in it may be continued."""

import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .checkpoint import load_checkpoint, save_checkpoint
from .config import RunConfig
from .errors import InputError

# What may differ between a run and its continuation without changing what is computed.
FREE_ON_RESUME = {
    *("out", "resume", "data_root", "cache_images", "workers", "device", "precision", "compile", "channels_last"),
    *("keep_checkpoints", "log_every", "tracker", "group", "tags"),
}


@dataclass(frozen=True)
class RunDirectory:
    """A folder for one run; it is made when the run is sure to start, not before."""

    path: Path
    resumed: bool  # it holds a run to continue

    @classmethod
    def choose(cls, config: RunConfig) -> "RunDirectory":
        """The folder that the configuration asks for.

        Raises:
            InputError: it is a file, holds another run or something else, or cannot be made.
        """
        if config.out is None:
            stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
            name = f"{config.dataset}-{config.model}-{config.objective}-seed{config.seed}"
            return cls(Path("runs") / f"{name}-{stamp}-{os.getpid()}", resumed=False)
        out = config.out
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file: name a folder")
        if (out / "config.yaml").exists():
            if config.resume == "auto":
                return cls(out, resumed=True)
            raise InputError(f"--out {out} holds another run: choose another folder, or continue it with --resume auto")
        if out.exists() and any(out.iterdir()):
            raise InputError(f"--out {out} is not empty and holds no run: choose another folder")
        existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise InputError(f"--out {out} cannot be made: {existing} is not a writable folder")
        return cls(out, resumed=False)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, epoch: int) -> Path:
        """Where the checkpoint of an epoch is."""
        return self.checkpoints / f"epoch_{epoch:05d}"

    def save_checkpoint(self, epoch: int, state: dict[str, Any], *, best_epoch: int, newest: int) -> None:
        """Save a checkpoint; then remove all but the `newest` few and the best."""
        save_checkpoint(self.checkpoints, self.checkpoint(epoch).name, state)
        saved = self._saved()
        for path in saved:
            if path not in saved[-newest:] and path != self.checkpoint(best_epoch):
                shutil.rmtree(path)

    def newest_intact_checkpoint(self, config: RunConfig) -> Path | None:
        """The checkpoint to continue from, None where there is none; damaged ones are named and passed over.

        Raises:
            InputError: it is of a run with other options.
        """
        for path in reversed(self._saved()):
            try:
                state = load_checkpoint(path)
            except InputError as error:
                print(f"batchcam: {error}; trying the one before", flush=True)
                continue
            self._check_same_run(config, state["config"])
            print(f"batchcam: resuming from {path}", flush=True)
            return path
        print(f"batchcam: no checkpoint in {self.path} yet: starting from the beginning", flush=True)
        return None

    def _saved(self) -> list[Path]:
        return sorted(self.checkpoints.glob("epoch_*"))

    def _check_same_run(self, config: RunConfig, saved: dict[str, Any]) -> None:
        ours = config.model_dump(mode="json")
        for name in ours.keys() - FREE_ON_RESUME:
            if name in saved and saved[name] != ours[name]:
                raise InputError(
                    f"--{name.replace('_', '-')} {ours[name]} differs from {saved[name]} of the run in {self.path}: "
                    "resume with the same options, or start anew with another --out"
                )
