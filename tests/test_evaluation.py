"""Every figure of an evaluation against loops over images, whatever the batches and the ranks."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from launching import SMALL, batchcam, gloo, launch
from safetensors.torch import load_file
from torch import Tensor

from distributed_batchcam import create_model
from distributed_batchcam.cli import run
from distributed_batchcam.data import Data, ImageSet, Loader, dataset_prototypes, load_data
from distributed_batchcam.evaluation import Evaluation, evaluate
from distributed_batchcam.explainer import Explainer, frozen
from distributed_batchcam.measures import BASIC, FIGURES, Measure, default_masks, every_measure, map_measures

SIZE = 16


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data("digits", image_size=SIZE, limit=60)


@pytest.fixture(scope="module")
def prototypes(data: Data) -> Tensor:
    return dataset_prototypes(data.valid, 10, classes=data.classes, workers=0)


@pytest.fixture(scope="module")
def explainer(data: Data) -> Explainer:
    """A network that says different things of different images, though nothing sensible."""
    torch.manual_seed(2)
    model = create_model("simple_cnn", 10, 1, SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.3
    return Explainer(model, data.normalize)


def evaluated(explainer: Explainer, images: ImageSet, prototypes: Tensor, measures: Any, batch: int = 16) -> Evaluation:
    return evaluate(explainer, Loader(images, batch, torch.device("cpu")), prototypes, measures)


def everything(images: ImageSet, subset: int = 20) -> list[Measure]:
    return every_measure(len(images), 10, default_masks("digits", images), torch.arange(subset))


@pytest.fixture(scope="module")
def result(explainer: Explainer, data: Data, prototypes: Tensor) -> Evaluation:
    return evaluated(explainer, data.test, prototypes, everything(data.test))


def cams(explainer: Explainer, images: ImageSet) -> tuple[Tensor, Tensor, Tensor]:
    """Features, α of the target class, and logits, one image at a time."""
    features, weights, logits = [], [], []
    with frozen(explainer.model):
        for index, target in enumerate(images.targets.tolist()):
            output = explainer(images[index][None] / 255)
            (gradient,) = torch.autograd.grad(output.logits[0, target], output.features)
            features.append(output.features.detach()[0].double())
            weights.append(gradient[0].double().mean((1, 2)))
            logits.append(output.logits.detach()[0])
    return torch.stack(features), torch.stack(weights), torch.stack(logits)


def scaled(cam: Tensor) -> Tensor:
    cam = cam.relu()
    return (cam - cam.min()) / (cam.max() - cam.min()) if cam.max() > cam.min() else torch.zeros_like(cam)


def test_accuracy_and_closeness_are_means_over_images(
    explainer: Explainer, data: Data, prototypes: Tensor, result: Evaluation
) -> None:
    features, weights, logits = cams(explainer, data.test)
    targets = data.test.targets
    maps = [
        oracles.resize(scaled(torch.einsum("k,kuv->uv", w, a)), (SIZE, SIZE))
        for w, a in zip(weights, features, strict=True)
    ]
    figures = result.figures()
    assert figures["accuracy"] == pytest.approx(100 * float((logits.argmax(1) == targets).double().mean()))
    assert figures["loss"] == pytest.approx(oracles.cross_entropy(logits.double(), targets), rel=1e-5)
    top5 = [target in row.topk(5).indices.tolist() for row, target in zip(logits, targets.tolist(), strict=True)]
    assert figures["top5_accuracy"] == pytest.approx(100 * sum(top5) / len(top5))
    pairs = list(zip(maps, prototypes.double()[targets], strict=True))
    assert figures["cam_l1"] == pytest.approx(sum(float((m - p).abs().mean()) for m, p in pairs) / 60, rel=1e-5)
    assert figures["cam_ssim"] == pytest.approx(sum(oracles.ssim(m, p) for m, p in pairs) / 60, rel=1e-4)


def test_class_maps_are_of_all_of_the_right_and_of_the_wrong_images(
    explainer: Explainer, data: Data, prototypes: Tensor, result: Evaluation
) -> None:
    features, weights, logits = cams(explainer, data.test)
    targets, right = data.test.targets, logits.argmax(1) == data.test.targets
    assert 0 < int(right.sum()) < 60, "the test needs both kinds"
    chosen = {"all": torch.ones(60, dtype=torch.bool), "right": right, "wrong": ~right}
    for label, (maps, counts) in result.class_rows().items():
        for index in range(10):
            here = chosen[label] & (targets == index)
            assert int(counts[index]) == int(here.sum())
            if not here.any():
                assert not maps[index].any()
                continue
            cam = torch.einsum("k,kuv->uv", weights[here].mean(0), features[here].mean(0))
            expected = oracles.resize(scaled(cam), (SIZE, SIZE))
            assert torch.allclose(maps[index].double(), expected, atol=1e-5), (label, index)
    similarities = [oracles.ssim(m.double(), p.double()) for m, p in zip(result.class_maps, prototypes, strict=True)]
    assert result.figures()["class_cam_ssim"] == pytest.approx(sum(similarities) / 10, rel=1e-4)


def test_every_figure_is_measured_and_described(result: Evaluation) -> None:
    assert set(result.figures()) == FIGURES.keys() - {"patch_mass", "patch_rank"}
    assert all(value is not None for value in result.figures().values())
    assert {name for name, info in FIGURES.items() if not info.independent} == {"cam_l1", "cam_ssim", "class_cam_ssim"}
    assert list(result.figures()) == [name for name in FIGURES if name in result.figures()], "in one order"


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_figures_do_not_depend_on_the_batch_size(
    batch: int, explainer: Explainer, data: Data, prototypes: Tensor, result: Evaluation
) -> None:
    other = evaluated(explainer, data.test, prototypes, everything(data.test), batch)
    for name, values in result.per_image.items():
        assert torch.allclose(values, other.per_image[name], rtol=1e-4, atol=1e-5, equal_nan=True), name


def test_costly_figures_are_of_the_subset_alone(result: Evaluation) -> None:
    for name in ("deletion_auc", "insertion_auc", "sensitivity"):
        measured = ~result.per_image[name].isnan()
        assert measured.tolist() == [True] * 20 + [False] * 40


def test_the_other_class_of_the_random_logit_test_is_another(
    explainer: Explainer, data: Data, prototypes: Tensor, result: Evaluation
) -> None:
    # Of the same class, the map would be the same, and the similarity 1.
    similarities = result.per_image["random_logit_ssim"]
    constant = result.per_image["constant_maps"] == 1
    assert (similarities[~constant] < 0.9999).all()


def test_constant_maps_are_counted_and_count_against_the_model(data: Data, prototypes: Tensor) -> None:
    model = create_model("simple_cnn", 10, 1, SIZE)
    with torch.no_grad():
        model.network.fc2.weight.zero_()  # every logit is its bias: no map for any class
    explainer = Explainer(model, data.normalize)
    figures = evaluated(explainer, data.test, prototypes, everything(data.test)).figures()
    assert figures["constant_maps"] == 60
    assert figures["relevance_mass"] == figures["relevance_rank"] == 0
    assert figures["sparseness"] == figures["sensitivity"] == figures["class_consistency"] == 0


def test_a_class_without_images_is_left_out_of_the_mean_and_has_no_figures(
    explainer: Explainer, data: Data, prototypes: Tensor
) -> None:
    without = data.test.subset((data.test.targets != 3).nonzero()[:, 0])
    result = evaluated(explainer, without, prototypes, BASIC)
    rows = result.figures_by_class()
    assert rows[3]["samples"] == 0
    assert rows[3]["accuracy"] is rows[3]["class_cam_ssim"] is None
    others = [row["class_cam_ssim"] for index, row in enumerate(rows) if index != 3]
    assert result.figures()["class_cam_ssim"] == pytest.approx(sum(others) / 9)  # type: ignore[arg-type]


def test_figures_by_class_put_together_are_the_figures(result: Evaluation) -> None:
    rows, figures = result.figures_by_class(), result.figures()
    for name in ("accuracy", "cam_l1", "relevance_mass", "random_logit_ssim"):
        total = sum(row["samples"] * row[name] for row in rows)  # type: ignore[operator]
        assert total / 60 == pytest.approx(figures[name])
    assert sum(row["constant_maps"] for row in rows) == figures["constant_maps"]  # type: ignore[misc]


def test_mistakes_are_wrong_and_the_most_confident_first(result: Evaluation) -> None:
    mistakes = result.confident_mistakes(7)
    confidence = result.per_image["confidence"]
    assert not result.right[mistakes].any()
    assert confidence[mistakes].tolist() == sorted(confidence[~result.right].tolist(), reverse=True)[:7]


def test_decoy_sets_are_measured_against_their_patches(explainer: Explainer) -> None:
    decoy = load_data("decoy_digits", image_size=SIZE, limit=60)
    prototypes = dataset_prototypes(decoy.valid, 10, classes=decoy.classes, workers=0)
    masks = default_masks("decoy_digits", decoy.test)
    assert list(masks) == ["relevance", "patch"]
    figures = evaluated(explainer, decoy.test, prototypes, map_measures(60, 10, masks)).figures()
    assert 0 < figures["patch_mass"] < 1  # type: ignore[operator]


def test_the_patch_is_looked_for_in_the_map_of_the_predicted_class(explainer: Explainer) -> None:
    decoy = load_data("decoy_digits", image_size=SIZE, limit=20).test
    prototypes = torch.rand(10, SIZE, SIZE)
    masks = default_masks("decoy_digits", decoy)
    result = evaluated(explainer, decoy, prototypes, map_measures(20, 10, masks), batch=20)
    (batch,) = Loader(decoy, 20, torch.device("cpu")).epoch()
    inside = masks["patch"](batch)
    with frozen(explainer.model):
        maps = explainer.maps(batch.images, explainer(batch.images).logits.argmax(1), (SIZE, SIZE))
    for cam, mask, value in zip(maps, inside, result.per_image["patch_mass"], strict=True):
        expected = float(cam[mask].sum() / cam.sum()) if cam.any() else 0.0
        assert float(value) == pytest.approx(expected, abs=1e-5)


def test_the_model_is_left_as_it_was(explainer: Explainer, data: Data, prototypes: Tensor) -> None:
    explainer.model.train()
    explainer.model.network.fc1.weight.requires_grad_(False)
    evaluated(explainer, data.test, prototypes, BASIC)
    assert explainer.model.training
    assert not explainer.model.network.fc1.weight.requires_grad
    assert explainer.model.network.fc2.weight.requires_grad
    assert all(parameter.grad is None for parameter in explainer.model.parameters())
    explainer.model.network.fc1.weight.requires_grad_(True)


# The command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert run(["train", *SMALL, "--epochs", "2", "--out", str(out)]) == 0
    return out


def test_training_leaves_an_evaluation_of_the_test_set(finished: Path) -> None:
    document = json.loads((finished / "evaluation-test.json").read_text())
    summary = json.loads((finished / "summary.json").read_text())
    assert document["accuracy"] == summary["test_accuracy"]
    assert document["relevance_mass"] == summary["relevance_mass"]
    assert document["mask"] == "foreground above 0.1"
    assert sum(map(sum, document["confusion"])) == document["samples"] == 359
    diagonal = sum(row[index] for index, row in enumerate(document["confusion"]))
    assert 100 * diagonal / 359 == pytest.approx(document["accuracy"])
    assert sum(bin_["samples"] for bin_ in document["calibration"]) == 359
    tensors = load_file(finished / "evaluation-test.safetensors")
    count = len(document["mistakes"])
    assert tensors["mistake_images"].shape == (count, 1, SIZE, SIZE)
    for mistake in document["mistakes"]:
        assert mistake["target"] != mistake["predicted"]
    assert (finished / "class_maps-test.png").stat().st_size > 10_000


def test_several_processes_find_the_same_figures(finished: Path, tmp_path: Path) -> None:
    found = {}
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        out.mkdir()
        arguments = ["evaluate", str(finished), "--device", "cpu", "--subset", "30", "--out", str(out)]
        done = batchcam(*arguments) if processes == 1 else launch(*arguments, flags=gloo(processes))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["samples"] == 359, "printed once"
        found[processes] = load_file(out / "evaluation-test.safetensors")
        figures = json.loads((out / "evaluation-test.json").read_text())
        for name in FIGURES.keys() & figures.keys():
            mine = json.loads((tmp_path / "1/evaluation-test.json").read_text())[name]
            assert figures[name] == pytest.approx(mine, rel=1e-4), name
    for name, tensor in found[1].items():
        for other in (2, 3):
            assert torch.allclose(found[other][name].double(), tensor.double(), atol=1e-4, equal_nan=True), name


def test_a_checkpoint_is_evaluated_like_the_model_that_it_became(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(finished / "checkpoints/epoch_00002"), "--device", "cpu", "--subset", "10"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["checkpoint"] == "epoch_00002"
    assert figures["accuracy"] == json.loads((finished / "summary.json").read_text())["test_accuracy"]
    assert (finished / "evaluation-epoch_00002-test.json").is_file()


def test_another_data_set_with_the_same_classes_is_evaluated_beside_it(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dataset", "decoy_digits", "--split", "valid", "--subset", "10"]
    assert run(["evaluate", str(finished), "--device", "cpu", *arguments]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["dataset"] == "decoy_digits"
    assert figures["patch_mass"] > 0
    assert (finished / "evaluation-decoy_digits-valid.json").is_file()


def test_users_own_masks_take_the_place_of_the_foreground(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    folder = tmp_path / "masks"
    folder.mkdir()
    for digit in range(10):
        Image.new("L", (SIZE, SIZE), "white").save(folder / f"{digit}.png")
    arguments = ["evaluate", str(finished), "--device", "cpu", "--subset", "10", "--out", str(tmp_path)]
    assert run([*arguments, "--masks", str(folder)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["relevance_mass"] == pytest.approx(1), "everything lies inside a mask of everything"
    assert figures["mask"] == str(folder)
    assert run([*arguments, "--masks", "none"]) == 0
    assert "relevance_mass" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "fashion_mnist"], "BATCHCAM_DATA"),
        (["--masks", "missing"], "no folder missing"),
        (["--out", "missing"], "missing is not a writable folder"),
        (["--subset", "0"], "--subset"),
        (["--threshold", "2"], "--threshold"),
        (["--threshold", "0.2", "--masks", "none"], "--threshold is of the foreground"),
    ],
)
def test_bad_input_is_one_line(
    finished: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHCAM_DATA", str(finished / "nowhere"))
    before = sorted(path.name for path in finished.iterdir())
    assert run(["evaluate", str(finished), "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in finished.iterdir()) == before


def test_figures_that_no_image_defines_are_null(explainer: Explainer, data: Data, prototypes: Tensor) -> None:
    masks = {"relevance": lambda batch: torch.zeros(len(batch.targets), SIZE, SIZE, dtype=torch.bool)}
    figures = evaluated(explainer, data.test, prototypes, map_measures(60, 10, masks)).figures()
    assert figures["relevance_mass"] is figures["relevance_rank"] is None
    assert not any(value is not None and math.isnan(value) for value in figures.values())


def test_a_loss_that_is_not_a_number_is_not_passed_over(result: Evaluation) -> None:
    losses = result.per_image["loss"].clone()
    losses[0] = math.nan
    assert replace(result, per_image={**result.per_image, "loss": losses}).figures()["loss"] is None


@pytest.mark.parametrize("trained", ["precision: fp16", "sync_batchnorm: true"])
def test_a_run_that_was_trained_on_gpus_is_evaluated_without_one(finished: Path, tmp_path: Path, trained: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    lines = (copy / "config.yaml").read_text().splitlines()
    changed = [trained if line.split(":")[0] == trained.split(":")[0] else line for line in lines]
    assert changed != lines
    (copy / "config.yaml").write_text("\n".join(changed))
    assert run(["evaluate", str(copy), "--device", "cpu", "--subset", "1"]) == 0


def test_modules_that_were_frozen_stay_so(explainer: Explainer) -> None:
    explainer.model.train()
    explainer.model.network.fc1.eval()
    with frozen(explainer.model):
        assert not any(module.training for module in explainer.model.modules())
    assert explainer.model.training
    assert not explainer.model.network.fc1.training
