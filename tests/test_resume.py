"""A run that was cut off goes on where it was, with the result it would have had."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launching import SMALL, gloo, launch
from PIL import Image
from short_runs import assert_same_result, checkpoints_of, cut_off, lines_of, train

from distributed_batchcam.checkpoint import load_checkpoint, pack, write_checkpoint
from distributed_batchcam.cli import run
from distributed_batchcam.config import make_config
from distributed_batchcam.models import SimpleCNN
from distributed_batchcam.run_directory import RunDirectory


@pytest.fixture
def dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers in every step."""
    forward = SimpleCNN.forward_features
    monkeypatch.setattr(
        SimpleCNN, "forward_features", lambda self, images: F.dropout(forward(self, images), 0.3, self.training)
    )


@pytest.mark.usefixtures("dropout")
def test_a_run_goes_on_within_an_epoch_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint-every", "9steps", "--keep-checkpoints", "9", "--log-every", "4", "--ema", "0.9"]
    options += ["--accumulate", "2"]
    assert train(tmp_path / "undisturbed", *options) == 0
    within = "epoch_00000_step_00000018", "epoch_00001_step_00000027"
    assert set(within) < set(checkpoints_of(tmp_path / "undisturbed"))
    for name in within:
        copy = cut_off(tmp_path / "undisturbed", tmp_path / name, name)
        assert train(copy, *options, "--resume", "auto") == 0
        assert f"resuming from {copy / 'checkpoints' / name}" in capsys.readouterr().out
        assert_same_result(copy, tmp_path / "undisturbed")


def test_a_checkpoint_within_an_epoch_can_be_evaluated(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--checkpoint-every", "15steps", "--epochs", "1") == 0
    checkpoint = tmp_path / "run/checkpoints/epoch_00000_step_00000015"
    assert run(["evaluate", str(checkpoint), "--device", "cpu", "--subset", "1"]) == 0


def test_a_run_goes_on_in_another_precision(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--log-every", "4") == 0
    copy = cut_off(tmp_path / "run", tmp_path / "copy", "epoch_00001")
    assert train(copy, "--log-every", "4", "--precision", "bf16", "--resume", "auto") == 0
    for ours, theirs in zip(lines_of(copy), lines_of(tmp_path / "run"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)


@pytest.mark.slow
def test_two_processes_with_running_statistics_go_on_within_an_epoch_bit_for_bit(tmp_path: Path) -> None:
    options = ["train", *SMALL, "--image-size", "8", "--model", "resnet10t", "--epochs", "1", "--ema", "0.9"]
    options += ["--log-every", "4", "--checkpoint-every", "11steps"]
    undisturbed = tmp_path / "undisturbed"
    assert launch(*options, "--out", str(undisturbed), flags=gloo(2)).returncode == 0
    copy = cut_off(undisturbed, tmp_path / "copy", "epoch_00000_step_00000011")
    result = launch(*options, "--out", str(copy), "--resume", "auto", flags=gloo(2))
    assert result.returncode == 0, result.stderr
    assert_same_result(copy, undisturbed)


def test_one_and_three_processes_go_on_from_within_an_epoch_of_two(tmp_path: Path) -> None:
    options = ["train", *SMALL, "--epochs", "1", "--log-every", "4", "--checkpoint-every", "10steps"]
    undisturbed = tmp_path / "undisturbed"
    assert launch(*options, "--out", str(undisturbed), flags=gloo(2)).returncode == 0
    for processes in (1, 3):
        copy = cut_off(undisturbed, tmp_path / str(processes), "epoch_00000_step_00000010")
        result = launch(*options, "--out", str(copy), "--resume", "auto", flags=gloo(processes))
        assert result.returncode == 0, result.stderr
        for ours, theirs in zip(lines_of(copy), lines_of(undisturbed), strict=True):
            # Steps 9 to 12 are one line, of which two were done by others.
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
            assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=1)


def test_other_data_in_the_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    for name in ("cat", "dog"):
        (data / name).mkdir(parents=True)
        for index in range(12):
            Image.new("RGB", (12, 12), (20 * index, 100, 50)).save(data / name / f"{index}.png")
    options = ["train", "--dataset", "imagefolder", "--data-root", str(data), "--image-size", "16", "--device", "cpu"]
    options += ["--batch-size", "4", "--valid-size", "4", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert run(options) == 0
    for index in range(12, 16):
        shutil.copy(data / "cat/3.png", data / f"cat/{index}.png")
    assert run([*options, "--resume", "auto"]) == 2
    assert "the data set has changed: training images" in capsys.readouterr().err
    shutil.copytree(data / "dog", data / "eel")
    assert run([*options, "--resume", "auto"]) == 2
    assert "classes (3, new: ['eel']) differ from those (2, gone: [])" in capsys.readouterr().err


def test_a_refused_checkpoint_is_set_aside_and_the_order_stays_right(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, resumed=True)
    config = make_config({})
    for epoch in (1, 2, 3):
        write_checkpoint(directory.checkpoints, f"epoch_{epoch:05d}", pack({"config": config.model_dump(mode="json")}))
    (directory.checkpoint(3) / "state.json").write_text("{}")
    assert directory.newest_intact_checkpoint(config, {}) == directory.checkpoint(2)
    assert checkpoints_of(tmp_path) == ["epoch_00001", "epoch_00002", "refused_epoch_00003"]
    directory.write_checkpoint("epoch_00002_step_00000007", pack({"config": {}}), best_epoch=1, newest=1)
    assert checkpoints_of(tmp_path) == ["epoch_00001", "epoch_00002_step_00000007", "refused_epoch_00003"]


def test_a_checkpoint_of_other_tensors_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "--epochs", "1") == 0
    path = tmp_path / "run/checkpoints/epoch_00001"
    state = load_checkpoint(path)
    state["model"]["fc2.weight"] = torch.zeros(3)
    write_checkpoint(path.parent, path.name, pack(state))
    assert train(tmp_path / "run", "--epochs", "1", "--resume", "auto") == 2
    said = capsys.readouterr().err
    assert "epoch_00001 does not fit this run" in said
    assert said.count("\n") == 1
