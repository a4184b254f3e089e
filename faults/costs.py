"""What checkpoints cost, as a share of a run."""

import statistics
import time
from pathlib import Path

import torch

from distributed_batchcam.checkpoint import load_checkpoint, pack
from distributed_batchcam.checkpoint_writer import CheckpointWriter
from distributed_batchcam.run_directory import RunDirectory

from .runs import Child, Figures, fresh

MODELS = {"simple_cnn": 28, "resnet18": 28}
REPEATS = 5


def of_checkpoints(folder: Path) -> list[Figures]:
    """How long training waits for a checkpoint, how long its writing takes beside it, and its reading."""
    return [_of_model(folder, model, size) for model, size in MODELS.items()]


def _of_model(folder: Path, model: str, size: int) -> Figures:
    out = fresh(folder / model)
    options = ["--model", model, "--image-size", str(size), "--epochs", "1", "--batch-size", "256"]
    assert Child(out, options).wait(1200) == 0
    path = RunDirectory(out, resumed=True).checkpoint(1)
    megabytes = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    figures = Figures(f"checkpoint of `{model}`, {megabytes:.0f} MB", "cost")
    state = load_checkpoint(path)
    directory = RunDirectory(folder / f"{model}-copies", resumed=False)
    writer = CheckpointWriter(directory, 2, print)
    for number in range(REPEATS):
        since = time.monotonic()
        pack(state)
        figures.took("training waits", time.monotonic() - since)
        writer.save(f"epoch_{number:05d}", state, 0)
        since = time.monotonic()
        writer.wait()
        figures.took("written beside it in", time.monotonic() - since)
        since = time.monotonic()
        load_checkpoint(directory.checkpoint(number))
        figures.took("read and checked in", time.monotonic() - since)
        figures.count(None)
    writer.close()
    wait, write = (statistics.median(figures.seconds[what]) for what in ("training waits", "written beside it in"))
    share, at_most = (100 * seconds / 500 for seconds in (wait, wait + write))
    figures.note = f"one every 500 s costs {share:.4f} % of a run, {at_most:.4f} % if nothing overlapped"
    return figures


torch.set_num_threads(1)
