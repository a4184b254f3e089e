"""A run from beginning to end in one process: what it leaves, repeats and resumes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import SMALL
from PIL import Image
from safetensors.torch import load_file

from distributed_batchcam import create_model
from distributed_batchcam.checkpoint import load_run
from distributed_batchcam.cli import run
from distributed_batchcam.config import make_config
from distributed_batchcam.data import load_data
from distributed_batchcam.objectives import OBJECTIVES
from distributed_batchcam.trainer import train as fit


def lines_of(run_dir: Path, split: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if split in (None, line["split"])]


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def train(out: Path, *arguments: str) -> int:
    return run(["train", *SMALL, "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train(out, "--epochs", "4", "--log-every", "5") == 0
    return out


def test_run_directory_holds_what_the_contract_names(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        *("config.yaml", "metrics.jsonl", "summary.json", "checkpoints"),
        *("model.safetensors", "prototypes.safetensors", "class_maps-test.png"),
        *("evaluation-test.json", "evaluation-test.safetensors", "report.html"),
    } <= names
    summary = summary_of(finished)
    assert {
        *("model", "dataset", "objective", "weight", "image_size", "seed", "epochs", "world_size", "params"),
        *("gflops", "test_accuracy", "best_test_accuracy", "best_epoch", "cam_l1", "cam_ssim"),
        *("class_cam_ssim", "images_per_second", "train_seconds"),
    } <= summary.keys()
    assert summary["world_size"] == 1
    assert summary["params"] == sum(p.numel() for p in create_model("simple_cnn", image_size=16).parameters())


def test_it_learns_to_classify_and_to_look_like_the_prototypes(finished: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "baseline", "--epochs", "4", "--objective", "baseline") == 0
    guided, plain = summary_of(finished), summary_of(tmp_path / "baseline")
    assert guided["test_accuracy"] > 85
    assert guided["class_cam_ssim"] > plain["class_cam_ssim"] + 0.2
    assert guided["cam_l1"] < plain["cam_l1"]


def test_metrics_tell_step_epoch_and_each_part_of_the_loss(finished: Path) -> None:
    training = lines_of(finished, "train")
    for line in training:
        assert line["loss"] == pytest.approx(line["loss_class"] + 0.1 * line["loss_cam"], rel=1e-5)
        assert {"step", "epoch", "lr", "images_per_second", "accuracy"} <= line.keys()
    assert training[-1]["loss"] < training[0]["loss"]
    steps = 1295 // 64  # whole global batches of the training images left after validation
    assert [line["step"] for line in lines_of(finished, "valid")] == [steps, 2 * steps, 3 * steps, 4 * steps]


def test_whoever_follows_a_run_is_told_each_epoch_and_may_end_it(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []

    def follow(figures: dict[str, Any]) -> None:
        assert (tmp_path / f"run/checkpoints/epoch_{figures['epoch']:05d}").exists(), "told before it was safe"
        told.append(figures)
        if figures["epoch"] == 2:
            raise SystemExit

    config = make_config({"dataset": "digits", "image_size": 16, "device": "cpu", "epochs": 3, "out": tmp_path / "run"})
    with pytest.raises(SystemExit):
        fit(config, follow)
    assert told == lines_of(tmp_path / "run", "valid")
    assert [figures["epoch"] for figures in told] == [1, 2]
    fit(make_config({**config.model_dump(exclude_none=True), "resume": "auto"}), told.append)
    assert [figures["epoch"] for figures in told] == [1, 2, 3]


def test_newest_and_best_checkpoints_stay(finished: Path) -> None:
    best = summary_of(finished)["best_epoch"]
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == sorted({"epoch_00003", "epoch_00004", f"epoch_{best:05d}"})


def test_the_saved_model_is_the_one_that_was_evaluated(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(finished), "--device", "cpu", "--subset", "10"]) == 0
    figures, summary = json.loads(capsys.readouterr().out), summary_of(finished)
    assert figures["accuracy"] == summary["test_accuracy"]
    for name in ("cam_l1", "cam_ssim", "class_cam_ssim"):
        assert figures[name] == pytest.approx(summary[name], rel=1e-6)
    assert load_run(finished).classes == tuple("0123456789")


def test_its_own_config_repeats_the_run_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    assert run(["train", "--config", str(finished / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert_same_weights(finished, tmp_path / "again")


def interrupted_copy(finished: Path, copy: Path, *, epoch: int) -> Path:
    """What the run would have left, had it been killed in the middle of the epoch after `epoch`."""
    shutil.copytree(finished, copy)
    for name in ("model.safetensors", "summary.json", "class_maps-test.png"):
        (copy / name).unlink()
    for path in (copy / "checkpoints").iterdir():
        if path.name > f"epoch_{epoch:05d}":
            shutil.rmtree(path)
    return copy


def test_a_resumed_run_ends_where_the_undisturbed_one_did(finished: Path, tmp_path: Path) -> None:
    copy = interrupted_copy(finished, tmp_path / "killed", epoch=3)
    assert train(copy, "--epochs", "4", "--log-every", "5", "--resume", "auto") == 0
    assert_same_weights(finished, copy)
    ours, theirs = lines_of(copy), lines_of(finished)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line.get("loss") for line in ours] == [line.get("loss") for line in theirs]
    assert summary_of(copy)["test_accuracy"] == summary_of(finished)["test_accuracy"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = interrupted_copy(finished, tmp_path / "killed", epoch=4)
    tensors = copy / "checkpoints/epoch_00004/tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert train(copy, "--epochs", "4", "--log-every", "5", "--resume", "auto") == 0
    said = capsys.readouterr().out
    assert "epoch_00004: tensors.safetensors is damaged" in said
    assert "resuming from" in said
    assert "epoch_00003" in said
    assert_same_weights(finished, copy)


def test_resume_of_nothing_starts_from_the_beginning(tmp_path: Path) -> None:
    assert train(tmp_path / "new", "--epochs", "1", "--resume", "auto") == 0
    assert summary_of(tmp_path / "new")["epochs"] == 1


def test_resume_with_other_options_names_the_difference(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = interrupted_copy(finished, tmp_path / "killed", epoch=3)
    before = (copy / "config.yaml").read_bytes()
    assert train(copy, "--epochs", "4", "--resume", "auto", "--weight", "0.5") == 2
    assert "--weight 0.5 differs from 0.1 of the run" in capsys.readouterr().err
    assert (copy / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "objective", [*(name for name in OBJECTIVES if name not in ("baseline", "bcpl_l1")), "bcpl_l1+10psl"]
)
def test_every_objective_trains(objective: str, tmp_path: Path) -> None:
    """On the decoys, whose patches are the masks where an objective needs some, and depart from clean prototypes."""
    options = ["--epochs", "1", "--dataset", "decoy_digits", "--objective", objective]
    if objective == "pdl":
        clean = ["--dataset", "digits", "--image-size", "16", "--out", str(tmp_path / "clean")]
        assert run(["prototypes", *clean]) == 0
        options += ["--prototypes", str(tmp_path / "clean")]
    assert train(tmp_path / "run", *options) == 0
    losses = [line["loss_cam"] for line in lines_of(tmp_path / "run", "train")]
    assert all(loss > 0 for loss in losses)
    assert summary_of(tmp_path / "run")["objective"] == objective


OPTIONS = {
    "sgd": ["--optimizer", "sgd", "--lr", "0.02", "--schedule", "cosine", "--warmup", "0.1"],
    "constant": ["--schedule", "constant", "--label-smoothing", "0.1", "--clip-norm", "1"],
    "bf16": ["--precision", "bf16", "--channels-last"],
    "ema": ["--ema", "0.9"],
    "accumulate": ["--accumulate", "2"],
    "no validation split": ["--valid-size", "0"],
    "sums, other direction": ["--reduction", "sums", "--resize", "prototypes"],
    "exponents": ["--objective", "bcpl_ssim", "--ssim-exponents", "1", "0.5", "2"],
    "target class": ["--objective", "pl_l2", "--cam-class", "target"],
    "input gradients": ["--objective", "rrr", "--dataset", "decoy_digits", "--clip-norm", "1", "--accumulate", "2"],
    "input gradients, bf16": [
        *("--objective", "rrr", "--dataset", "decoy_digits", "--precision", "bf16", "--channels-last"),
    ],
    "support": ["--objective", "psl", "--support", "0.2"],
    "named layer": ["--model", "resnet10t", "--target-layer", "layer2", "--image-size", "8"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_train_and_repeat_from_their_config(options: list[str], tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--epochs", "1", *options) == 0
    assert summary_of(tmp_path / "run")["test_accuracy"] > 20
    assert run(["evaluate", str(tmp_path / "run"), "--device", "cpu", "--subset", "10"]) == 0


def test_gradient_accumulation_follows_the_whole_batch(tmp_path: Path) -> None:
    # Cross-entropy alone: with BCPL, class means are taken per piece, and differ.
    for name, pieces in (("whole", "1"), ("pieces", "4")):
        assert train(tmp_path / name, "--epochs", "1", "--objective", "baseline", "--accumulate", pieces) == 0
    whole, pieces_ = lines_of(tmp_path / "whole", "train")[-1], lines_of(tmp_path / "pieces", "train")[-1]
    assert whole["step"] == pieces_["step"]
    assert whole["loss"] == pytest.approx(pieces_["loss"], rel=1e-4)


def test_compiling_changes_no_more_than_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_(function: Any) -> Any:
        compiled.append(function.__name__)
        return real_compile(function, backend="aot_eager")

    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    for name, options in (("plain", []), ("compiled", ["--compile"])):
        assert train(tmp_path / name, "--epochs", "1", *options) == 0
    assert compiled == ["forward_features", "of_weights"]
    plain, other = (lines_of(tmp_path / name, "train")[-1] for name in ("plain", "compiled"))
    for part in ("loss_class", "loss_cam"):
        assert other[part] == pytest.approx(plain[part], rel=1e-4), part


def test_moving_average_is_what_is_evaluated_and_saved(tmp_path: Path) -> None:
    from distributed_batchcam.checkpoint import load_checkpoint

    assert train(tmp_path / "run", "--epochs", "1", "--ema", "0.9") == 0
    state = load_checkpoint(tmp_path / "run/checkpoints/epoch_00001")
    saved = weights_of(tmp_path / "run")
    assert all(torch.equal(saved[name], state["ema"][name]) for name in saved)
    assert any(not torch.equal(saved[name], state["model"][name]) for name in saved)


def test_users_own_prototypes_are_trained_towards_and_saved(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "prototypes"
    folder.mkdir()
    for digit in range(10):
        image = Image.new("L", (16, 16))
        image.paste(255, (digit, 2, digit + 4, 12))
        image.save(folder / f"{digit}.png")
    assert train(tmp_path / "run", "--epochs", "1", "--prototypes", str(folder)) == 0
    saved = load_file(tmp_path / "run/prototypes.safetensors")
    assert saved["train"][3, 5, 4] == 1
    assert saved["train"][3, 5, 12] == 0
    assert torch.equal(saved["train"], saved["valid"])


def masks_of_digits(folder: Path) -> Path:
    """A mask per class, the left half of the image."""
    from PIL import Image

    folder.mkdir()
    for digit in range(10):
        mask = Image.new("L", (16, 16))
        mask.paste(255, (0, 0, 8, 16))
        mask.save(folder / f"{digit}.png")
    return folder


def input_gradient_on_the_left(run_dir: Path) -> float:
    """Share of squared input gradients in the left half of test images."""
    data = load_data("digits", image_size=16)
    model = load_run(run_dir).model.eval()
    images = data.normalize(data.test.images.float() / 255).requires_grad_()
    scores = model(images).logits.log_softmax(1)
    gradient = torch.autograd.grad(scores.sum(), images)[0].square().sum(1)
    return (gradient[:, :, :8].sum() / gradient.sum()).item()


def test_users_own_masks_say_where_the_input_must_not_matter(tmp_path: Path) -> None:
    masks = masks_of_digits(tmp_path / "masks")
    options = ["--epochs", "4", "--objective", "rrr", "--masks", str(masks)]
    for weight in ("1e-6", "1e-3"):
        assert train(tmp_path / weight, *options, "--weight", weight) == 0
    assert input_gradient_on_the_left(tmp_path / "1e-6") > 0.4
    assert input_gradient_on_the_left(tmp_path / "1e-3") < 0.3
    assert str(masks) in (tmp_path / "1e-3/config.yaml").read_text()


def test_a_run_with_masks_repeats_and_resumes(tmp_path: Path) -> None:
    options = ["--objective", "0.5rrr+rrr_g", "--masks", str(masks_of_digits(tmp_path / "masks"))]
    whole = tmp_path / "whole"
    assert train(whole, "--epochs", "2", *options) == 0
    assert run(["train", "--config", str(whole / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert_same_weights(whole, tmp_path / "again")
    copy = interrupted_copy(whole, tmp_path / "killed", epoch=1)
    assert train(copy, "--epochs", "2", *options, "--resume", "auto") == 0
    assert_same_weights(whole, copy)


def test_accumulated_input_gradients_follow_the_whole_batch(tmp_path: Path) -> None:
    options = ["--epochs", "1", "--dataset", "decoy_digits", "--objective", "rrr+rrr_g"]
    for name, pieces in (("whole", "1"), ("pieces", "4")):
        assert train(tmp_path / name, *options, "--accumulate", pieces) == 0
    whole, pieces_ = lines_of(tmp_path / "whole", "train")[-1], lines_of(tmp_path / "pieces", "train")[-1]
    assert whole["loss_cam"] == pytest.approx(pieces_["loss_cam"], rel=1e-3)


def test_a_transformer_with_fused_attention_trains_on_input_gradients(tmp_path: Path) -> None:
    options = ["--model", "vit_tiny_patch16_224", "--image-size", "32", "--batch-size", "512", "--epochs", "1"]
    assert train(tmp_path / "run", "--dataset", "decoy_digits", "--objective", "rrr", *options) == 0


def test_a_run_shows_where_its_images_depart_from_the_prototypes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prototypes, out = tmp_path / "prototypes", tmp_path / "run"
    assert run(["prototypes", "--dataset", "digits", "--image-size", "16", "--out", str(prototypes)]) == 0
    options = ["--dataset", "decoy_digits", "--objective", "pdl", "--prototypes", str(prototypes), "--epochs", "1"]
    assert train(out, *options) == 0
    said = capsys.readouterr().out
    assert "the training images depart from the prototypes in " in said
    assert f"standard deviations at most; {out / 'departure'}.png shows where" in said
    shown = np.asarray(Image.open(out / "departure.png")).astype(float)
    assert shown.shape == (16, 16)
    assert shown.max() == 255
    assert min(shown[0, 0], shown[0, -1], shown[-1, 0], shown[-1, -1]) > 150
    assert shown[4:12, 4:12].max() < 50


def test_ten_clean_prototypes_keep_a_model_from_the_decoy(tmp_path: Path) -> None:
    """What the project is for: right for the right reasons where training and validation images mislead."""
    prototypes = tmp_path / "prototypes"
    assert run(["prototypes", "--dataset", "digits", "--image-size", "28", "--out", str(prototypes)]) == 0
    options = ["--dataset", "decoy_digits", "--image-size", "28", "--epochs", "8"]
    assert train(tmp_path / "baseline", *options, "--objective", "baseline") == 0
    for objective, weight in (("psl", "1"), ("pdl", "3")):
        ours = ["--objective", objective, "--weight", weight, "--prototypes", str(prototypes)]
        assert train(tmp_path / objective, *options, *ours) == 0
    misled, right, also_right = (summary_of(tmp_path / name)["test_accuracy"] for name in ("baseline", "psl", "pdl"))
    assert lines_of(tmp_path / "baseline", "valid")[-1]["accuracy"] > 95
    assert misled < 93
    assert right > 96
    assert also_right > 96


def test_debug_mode_ends_with_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "--debug", "--epochs", "3") == 0
    said = capsys.readouterr().out
    assert said.count("debug: images (64, 1, 16, 16) float32 -> features (64, 64, 8, 8) float32") == 1
    assert "debug: ok     the loss fell from" in said
    assert "debug: ok     all gradients are finite" in said
    assert "debug: ok     every parameter gets a gradient" in said
    assert not torch.are_deterministic_algorithms_enabled()


def test_debug_mode_fails_where_nothing_is_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "--debug", "--epochs", "1", "--lr", "1e-12") == 1
    assert "debug: FAILED the loss fell" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("BATCHCAM_DATA"), reason="BATCHCAM_DATA names no folder with MNIST")
def test_real_mnist_is_learnt_in_one_epoch(tmp_path: Path) -> None:
    options = ["--dataset", "mnist", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert run(["train", *options]) == 0
    summary = summary_of(tmp_path / "run")
    assert summary["test_accuracy"] > 98
    assert summary["class_cam_ssim"] > 0.85


def test_a_diverging_run_stops_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optimizer", "sgd", "--lr", "1e30", "--schedule", "constant"]
    assert train(tmp_path / "run", "--epochs", "1", *options) == 1
    assert (
        "the gradient is not finite in 11 steps in a row, up to step 12; their samples are in"
        in capsys.readouterr().err
    )
