"""Short training runs in this process, and what they leave."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from launching import SMALL
from safetensors.torch import load_file

from distributed_batchcam.cli import run

CLOCK = {"time", "images_per_second"}


def train(out: Path, *arguments: str) -> int:
    return run(["train", *SMALL, "--epochs", "2", "--out", str(out), *arguments])


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """What was logged, without what the clock has a part in."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def assert_same_result(ours: Path, undisturbed: Path) -> None:
    first, second = (load_file(path / "model.safetensors") for path in (ours, undisturbed))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert lines_of(ours) == lines_of(undisturbed)


def checkpoints_of(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def cut_off(undisturbed: Path, copy: Path, last: str) -> Path:
    """What a run would have left, had it been killed just after the checkpoint `last`."""
    shutil.copytree(undisturbed, copy)
    (copy / "model.safetensors").unlink()
    (copy / "summary.json").unlink()
    for name in checkpoints_of(copy):
        if name > last:
            shutil.rmtree(copy / "checkpoints" / name)
    return copy


def options_of_small() -> dict[str, Any]:
    """`SMALL`, for `make_config`."""
    return {"dataset": "digits", "image_size": 16, "batch_size": 64, "device": "cpu"}
