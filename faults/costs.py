"""What checkpoints cost, as a share of a run."""

import statistics
import time
from pathlib import Path

import torch

from distributed_batchcam.checkpoint import load_checkpoint, pack
from distributed_batchcam.checkpoint_writer import CheckpointWriter
from distributed_batchcam.run_directory import RunDirectory

from .runs import Child, fresh

MODELS = {"simple_cnn": 28, "resnet18": 28}
REPEATS = 5


def of_checkpoints(folder: Path) -> str:
    """Markdown: how long training waits for a checkpoint, and how long its writing takes beside it."""
    rows = [_row(folder, model, size) for model, size in MODELS.items()]
    titles = [
        "checkpoint of",
        "MB",
        "training waits, ms",
        "written beside it in, ms",
        "one every 500 s costs",
        "read, ms",
    ]
    return "\n".join([f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *rows])


def _row(folder: Path, model: str, size: int) -> str:
    out = fresh(folder / model)
    options = ["--model", model, "--image-size", str(size), "--epochs", "1", "--batch-size", "256"]
    assert Child(out, options).wait(400) == 0
    path = RunDirectory(out, resumed=True).checkpoint(1)
    since = time.monotonic()
    state = load_checkpoint(path)
    reading = time.monotonic() - since
    directory = RunDirectory(folder / f"{model}-copies", resumed=False)
    writer = CheckpointWriter(directory, 2, print)
    waits, writes = [], []
    for number in range(REPEATS):
        since = time.monotonic()
        pack(state)
        waits.append(time.monotonic() - since)
        writer.save(f"epoch_{number:05d}", state, 0)
        since = time.monotonic()
        writer.wait()
        writes.append(time.monotonic() - since)
    writer.close()
    megabytes = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    wait, write = statistics.median(waits), statistics.median(writes)
    share = f"{100 * wait / 500:.4f} % ({100 * (wait + write) / 500:.4f} % if nothing overlapped)"
    return f"| `{model}` | {megabytes:.0f} | {1000 * wait:.1f} | {1000 * write:.0f} | {share} | {1000 * reading:.0f} |"


torch.set_num_threads(1)
