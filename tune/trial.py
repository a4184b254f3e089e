"""One trial of a sweep, as Ray Tune runs it: an ordinary run that reports to Tune after every epoch."""

import json
import os
import socket
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed_batchcam.config import RunConfig
from distributed_batchcam.errors import InputError, InUseError

from .space import Options, Space, Trial
from .storage import SWEEP, Storage, TrialFolder

EPOCH, ACCURACY, FAILURE = "epoch", "valid_accuracy", "failure"
"""What a trial reports: epochs done, accuracy on the validation set in percent, and why it failed for good."""


IN_USE_SECONDS = 150
"""That a trial waits for an earlier attempt to let go of the run directory."""


@dataclass(frozen=True)
class Settings:
    """What all trials of a sweep have in common."""

    space: Space
    storage: str
    sweep: str
    """Id of the sweep, to be found in the storage: a folder that nodes do not share lacks it."""
    options: Options
    """Further options of each run that are not part of what a trial is, such as the tracker."""
    stopped: dict[str, int] = field(default_factory=dict)
    """Trials, by id, that an earlier session stopped early, and after which epoch."""

    def trial(self, config: dict[str, Any]) -> Trial:
        """The trial that Tune means."""
        return self.space.trial(config["axes"])

    def run_config(self, trial: Trial, **further: Any) -> RunConfig:
        """The configuration of a trial's run; on W&B all runs of a sweep are one group, each tagged with its id."""
        config = trial.config(**self.options, **further)
        if config.tracker != "wandb":
            return config
        return trial.config(**self.options, **further, group=self.sweep, tags=[f"trial-{trial.id}"])


def run_trial(config: dict[str, Any], settings: Settings) -> None:
    """Train one trial, from where it stands: the trainable of Ray Tune.

    What was done in an earlier session is reported, not done again, so that schedulers know it. A failure that
    another attempt would meet again is reported; anything else is raised, and Tune tries again elsewhere.
    """
    trial, storage = settings.trial(config), Storage.at(settings.storage)
    with (
        storage.trial(trial.name) as folder,
        folder.log.open("a", buffering=1, encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        print(f"batchcam: trial {trial.id} on {socket.gethostname()}, process {os.getpid()}", flush=True)
        try:
            _require_shared(storage, settings)
            # All but the last epoch, which is reported once the run is finished: a scheduler may stop a trial then.
            known = min(settings.stopped.get(trial.id, 10**9), trial.config().epochs - 1)
            for line in _history(folder.path):
                if line["epoch"] <= known:
                    _report(line)
            if not _is_finished(folder.path) and trial.id not in settings.stopped:
                _train(trial, folder, storage, settings)
            if _is_finished(folder.path):
                _report(_history(folder.path)[-1])
        except _permanent_failures() as error:
            reason = " ".join(str(error).split())
            print(f"batchcam: failed: {reason}", flush=True)
            folder.push()
            _report({"epoch": 0, "accuracy": 0.0}, **{FAILURE: reason})


def _train(trial: Trial, folder: TrialFolder, storage: Storage, settings: Settings) -> None:
    from .ranks import train_on_all_ranks

    config = settings.run_config(trial, out=folder.path, resume="auto")

    def on_epoch(figures: dict[str, Any]) -> None:
        folder.push()
        if figures["epoch"] < config.epochs:
            _report(figures)

    deadline = time.monotonic() + IN_USE_SECONDS
    while True:
        try:
            train_on_all_ranks(config, on_epoch, storage, trial.name)
            break
        except InUseError:
            # An earlier attempt, on a node that was lost: shared folders let go of its lock after a while.
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
    folder.push()
    _free_gpu_memory()


def _report(figures: dict[str, Any], **further: Any) -> None:
    """Tell Tune; where the scheduler has stopped the trial, this does not return but ends its thread."""
    from ray import tune

    tune.report({EPOCH: figures["epoch"], ACCURACY: figures["accuracy"], **further})


def _require_shared(storage: Storage, settings: Settings) -> None:
    content = storage.read(SWEEP)
    if content is None or json.loads(content)["id"] != settings.sweep:
        raise InputError(
            f"--storage {storage} is not the same folder on {socket.gethostname()}: "
            "name one that all nodes share, or a URI such as s3://bucket/path"
        )


def _history(run_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of the validation set, epoch by epoch."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = {}
    for line in lines:
        try:
            figures = json.loads(line)
        except ValueError:
            continue  # cut off by a crash; that epoch is done again
        if figures["split"] == "valid":
            found[figures["epoch"]] = figures
    return list(found.values())


def _is_finished(run_dir: Path) -> bool:
    return (run_dir / "summary.json").exists()


def _permanent_failures() -> tuple[type[Exception], ...]:
    import torch

    return (InputError, FloatingPointError, torch.OutOfMemoryError)


def _free_gpu_memory() -> None:
    """Ray uses this process for the next trial too, which must find the GPU as a new process would."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
