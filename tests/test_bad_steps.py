"""Gradients that are not finite, and memory that is not there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from short_runs import lines_of, train

from distributed_batchcam import trainer
from distributed_batchcam.checkpoint import load_checkpoint


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> list[list[int]]:
    """Make the gradient of some steps not finite; returns where the samples of those steps will be."""
    step, samples = trainer.Trainer.train_step, []

    def poisoned(self: trainer.Trainer, batch: Any) -> Any:
        if self.progress.step + 1 in steps:
            samples.append(batch.indices.tolist())
            batch = batch._replace(images=batch.images * torch.nan)
        return step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", poisoned)
    return samples


@pytest.mark.parametrize(
    "options", [[], ["--optimizer", "sgd", "--lr", "0.02"], ["--model", "resnet10t", "--image-size", "8"]]
)
def test_a_bad_step_changes_nothing_and_its_samples_are_named(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = {1, 7, 8, 20}
    samples = poison(monkeypatch, poisoned)
    assert train(tmp_path / "run", "--epochs", "1", "--log-every", "6", "--checkpoint-every", "7steps", *options) == 0
    lines = [line for line in lines_of(tmp_path / "run") if line["split"] == "train"]
    assert [line["skipped_steps"] for line in lines] == [1, 3, 3, 4]
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "run/model.safetensors").values())
    named = [json.loads(line) for line in (tmp_path / "run/bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in named] == sorted(poisoned)
    assert [line["samples"] for line in named] == samples
    assert json.loads((tmp_path / "run/summary.json").read_text())["test_loss"] < 3


def test_a_skipped_step_leaves_weights_and_moments_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {6})
    assert train(tmp_path / "run", "--epochs", "1", "--checkpoint-every", "1step", "--keep-checkpoints", "99") == 0
    before, after = (load_checkpoint(tmp_path / f"run/checkpoints/epoch_00000_step_0000000{step}") for step in (5, 6))
    for name, weights in before["model"].items():
        assert torch.equal(weights, after["model"][name]), name
    for name, moments in before["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, after["optimizer"]["state"][name][key]), key


def test_too_many_bad_steps_in_a_row_end_the_run_with_good_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, set(range(25, 100)))
    assert train(tmp_path / "run", "--max-bad-steps", "3", "--log-every", "5") == 1
    said = capsys.readouterr().err
    assert "the gradient is not finite in 4 steps in a row, up to step 28; their samples are in" in said
    state = load_checkpoint(tmp_path / "run/checkpoints/epoch_00001")
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


def test_out_of_memory_is_one_line_that_says_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: trainer.Trainer, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trainer.Trainer, "train_step", full)
    assert train(tmp_path / "run") == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(
        "batchcam: error: out of memory on cpu with --batch-size 64 in 1 pieces on 1 processes: lower"
    )
    assert "\n" not in said
