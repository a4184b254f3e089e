"""The run directory: which one, what is in it, and whether a run in it may be continued."""

import os
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .checkpoint import Packed, load_checkpoint, write_atomic, write_checkpoint
from .config import RunConfig
from .errors import InputError, InUseError
from .run_lock import NAME, RunLock

# What may differ between a run and its continuation without changing what is computed.
FREE_ON_RESUME = {
    *("out", "resume", "data_root", "cache_images", "workers", "device", "precision", "compile", "cuda_graph"),
    *("channels_last", "checkpoint_every", "keep_checkpoints", "max_bad_steps", "timeout", "log_every"),
    *("tracker", "group", "tags"),
}


@dataclass
class RunDirectory:
    """A folder for one run; it is made when the run is sure to start, not before."""

    path: Path
    resumed: bool  # it holds a run to continue
    _lock: RunLock | None = field(default=None, init=False, repr=False)

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
        if out.exists() and any(_not_ours(out)):
            raise InputError(f"--out {out} is not empty and holds no run: choose another folder")
        existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise InputError(f"--out {out} cannot be made: {existing} is not a writable folder")
        return cls(out, resumed=False)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, epoch: int, step: int | None = None) -> Path:
        """Where the checkpoint after an epoch is, or after a step within the next one; by name they are in order."""
        within = "" if step is None else f"_step_{step:08d}"
        return self.checkpoints / f"epoch_{epoch:05d}{within}"

    def claim(self) -> None:
        """Make the folder and lock it, so that no other process trains into it.

        Raises:
            InputError: another process does, or has made a run there since; or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path)
            if not self.resumed and (self.path / "config.yaml").exists():
                self.release()
                raise self._taken()
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.path} cannot be written: {error.strerror or error}") from error
        for left_over in self.checkpoints.glob(".epoch_*"):  # of a write or a removal that was cut off
            shutil.rmtree(left_over, ignore_errors=True)

    def hold(self, config: RunConfig) -> None:
        """Before anything is written: make and lock the folder again if it vanished meanwhile.

        Raises:
            InUseError: another run has begun there.
            OSError: it cannot be made.
        """
        if self._lock is None or not self._lock.lost():
            return
        file = self.path / "config.yaml"
        if file.exists() and file.read_text() != config.to_yaml():
            raise self._taken()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.renew()
        if not file.exists():
            self.write_config(config)

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.release()

    def write_config(self, config: RunConfig) -> None:
        """Make the folder that of a run, and `batchcam train --config` on it repeat the run."""
        write_atomic(self.path / "config.yaml", config.to_yaml().encode())

    def write_checkpoint(self, name: str, packed: Packed, *, best_epoch: int, newest: int) -> None:
        """Write a checkpoint; then remove all but the `newest` few and the best."""
        self.hold(RunConfig(**packed.tree["config"]))
        write_checkpoint(self.checkpoints, name, packed)
        saved = self._saved()
        for path in saved:
            if path not in saved[-newest:] and path != self.checkpoint(best_epoch):
                # First out of sight: a removal that is cut off must not leave half a checkpoint under its name.
                hidden = path.with_name(f".{path.name}.old")
                path.rename(hidden)
                shutil.rmtree(hidden, ignore_errors=True)

    def newest_intact_checkpoint(self, config: RunConfig, data: dict[str, Any]) -> Path | None:
        """The checkpoint to continue from, None where there is none; damaged ones are named and set aside.

        Args:
            config: of the run that is to go on.
            data: classes and sizes of its data set, as its checkpoints note them.

        Raises:
            InputError: the checkpoint is of a run with other options or other data.
        """
        for path in reversed(self._saved()):
            try:
                state = load_checkpoint(path)
            except InputError as error:
                # Out of the order of those to come, but not deleted: it may be worth something to somebody.
                refused = path.rename(_free(path.with_name(f"refused_{path.name}")))
                print(f"batchcam: {error}; set aside as {refused.name}, trying the one before", flush=True)
                continue
            self._check_same_run(config, state.get("config", {}))
            self._check_same_data(data, state.get("data", {}))
            print(f"batchcam: resuming from {path}", flush=True)
            return path
        print(f"batchcam: no checkpoint in {self.path} yet: starting from the beginning", flush=True)
        return None

    def _taken(self) -> InUseError:
        return InUseError(f"--out {self.path} has become another run's: choose another folder")

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

    def _check_same_data(self, ours: dict[str, Any], saved: dict[str, Any]) -> None:
        for name in ours:
            if name in saved and saved[name] != ours[name]:
                raise InputError(
                    f"the data set has changed: {name} {_differing(ours[name], saved[name])} of the run in "
                    f"{self.path}: bring the old data back, or start anew with another --out"
                )


def _not_ours(out: Path) -> list[Path]:
    """What stands in a folder besides the traces of a run that was cut off before it began."""
    traces = {NAME, ".config.yaml.tmp"}
    empty = out / "checkpoints"
    return [
        path for path in out.iterdir() if path.name not in traces and not (path == empty and not any(empty.iterdir()))
    ]


def _free(path: Path) -> Path:
    """`path`, or with a number behind it if that is taken."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in range(1, 10_000))
    return path if not path.exists() else next(other for other in numbered if not other.exists())


def _differing(ours: Any, saved: Any) -> str:
    """In words; of two long lists, the first entries that are in one of them alone."""
    if isinstance(ours, list) and isinstance(saved, list):
        added, gone = ([x for x in a if x not in b][:3] for a, b in ((ours, saved), (saved, ours)))
        return f"({len(ours)}, new: {added}) differ from those ({len(saved)}, gone: {gone})"
    return f"{ours} differ from {saved}"
