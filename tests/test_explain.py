"""Explanations of single images and of classes: what they say, what they draw, what they leave."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from launching import SMALL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import distributed_batchcam
from distributed_batchcam import Explanations, explain, explain_classes, save_explanations
from distributed_batchcam.checkpoint import Run, load_run
from distributed_batchcam.cli import run
from distributed_batchcam.data import load_data
from distributed_batchcam.errors import InputError
from distributed_batchcam.explainer import Explainer, frozen
from distributed_batchcam.report.overlays import overlay, panel

SIZE = 16


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert run(["train", *SMALL, "--epochs", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def colored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on colour photographs of two kinds: warm and cold stripes."""
    folder = tmp_path_factory.mktemp("photos")
    for name, color in (("warm", (230, 120, 40)), ("cold", (30, 90, 220))):
        (folder / name).mkdir()
        for number in range(12):
            image = Image.new("RGB", (48, 40), (90, 90, 90))
            image.paste(color, (number, 5, number + 20, 30))
            image.save(folder / name / f"{number}.png")
    out = folder.parent / "colored-run"
    arguments = ["--dataset", "imagefolder", "--data-root", str(folder), "--image-size", "32", "--batch-size", "8"]
    assert run(["train", *arguments, "--device", "cpu", "--epochs", "1", "--out", str(out)]) == 0
    return out


def by_hand(trained: Run, image: torch.Tensor, index: int) -> torch.Tensor:
    """Grad-CAM of one image (ch, s, s) in [0, 1] for one class, from the definition."""
    with frozen(trained.model):
        output = Explainer(trained.model, trained.normalize)(image[None])
        (gradient,) = torch.autograd.grad(output.logits[0, index], output.features)
    cam = torch.einsum("k,kuv->uv", gradient[0].mean((1, 2)), output.features.detach()[0]).relu()
    return (cam - cam.min()) / (cam.max() - cam.min())


def test_explanations_are_the_maps_and_distances_of_each_image(finished: Path) -> None:
    found = explain(finished, indices=[3, slice(10, 14)], device="cpu")
    trained, data = load_run(finished), load_data("digits", image_size=SIZE)
    assert found.names == ("test-003", "test-010", "test-011", "test-012", "test-013")
    assert found.targets is not None
    for place, position in enumerate([3, 10, 11, 12, 13]):
        image = data.test[position] / 255
        assert torch.equal(found.images[place], image)
        assert int(found.targets[place]) == int(data.test.targets[position])
        predicted = int(found.predicted[place])
        cam = by_hand(trained, image, predicted)
        assert torch.allclose(found.predicted_maps[place], cam, atol=1e-5)
        resized = oracles.resize(cam.double(), (SIZE, SIZE))
        for index, prototype in enumerate(trained.prototypes["valid"].double()):
            assert float(found.l1[place, index]) == pytest.approx(float((resized - prototype).abs().mean()), abs=1e-5)
            assert float(found.ssim[place, index]) == pytest.approx(oracles.ssim(resized, prototype), abs=1e-4)


def test_target_maps_are_of_the_target_class(finished: Path) -> None:
    found = explain(finished, indices=[slice(None)], device="cpu")
    assert found.targets is not None
    assert found.target_maps is not None
    wrong = (found.predicted != found.targets).nonzero()[:, 0]
    assert len(wrong) > 0
    trained = load_run(finished)
    for place in wrong[:3].tolist():
        cam = by_hand(trained, found.images[place], int(found.targets[place]))
        assert torch.allclose(found.target_maps[place], cam, atol=1e-5)
    right = found.predicted == found.targets
    assert torch.equal(found.target_maps[right], found.predicted_maps[right])


def test_another_layer_can_be_explained(finished: Path) -> None:
    found = explain(finished, indices=[0], layer="conv1", device="cpu")
    assert found.predicted_maps.shape == (1, SIZE, SIZE), "conv1 works at the size of the image"
    assert torch.allclose(found.probabilities, explain(finished, indices=[0], device="cpu").probabilities, atol=1e-6)


def test_class_explanations_are_those_of_the_evaluation(finished: Path) -> None:
    from safetensors.torch import load_file

    found, saved = explain_classes(finished, device="cpu"), load_file(finished / "evaluation-test.safetensors")
    for name, maps in (("", found.class_maps), ("_right", found.right_maps), ("_wrong", found.wrong_maps)):
        assert torch.allclose(maps, saved[f"class_maps{name}"], atol=1e-4), name


def test_the_three_lines_of_the_readme(finished: Path, tmp_path: Path) -> None:
    explanations = distributed_batchcam.explain(str(finished), indices=[0, 1])
    pictures = save_explanations(explanations, tmp_path / "out")
    assert [picture.name for picture in pictures] == ["test-000.png", "test-001.png"]


# Files ---------------------------------------------------------------------------------------------------


def picture_files(folder: Path) -> dict[str, Path]:
    """One photograph in many disguises; all show warm stripes on grey, the left of the image dark."""
    rgb = Image.new("RGB", (60, 48), (90, 90, 90))
    rgb.paste((230, 120, 40), (20, 8, 40, 40))
    rgb.paste((0, 0, 0), (0, 0, 10, 48))
    files = {}

    def save(name: str, image: Image.Image, **options: Any) -> None:
        files[name] = folder / name
        image.save(files[name], **options)

    save("plain.png", rgb)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    save("exif.jpg", rgb.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=100, subsampling=0)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(255)
    save("alpha.png", alpha)
    save("animated.gif", rgb, save_all=True, append_images=[Image.new("RGB", rgb.size, "blue")])
    save("palette.png", rgb.quantize(64))
    save("cmyk.jpg", rgb.convert("CMYK"), quality=100, subsampling=0)
    save("tiff.tif", rgb)
    save("webp.webp", rgb, lossless=True)
    save("wrong_extension.bmp", rgb, format="PNG")
    save("jpeg2000.jp2", rgb)
    save("icon.tga", rgb)
    gray16 = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
    save("gray16.png", Image.fromarray(gray16))
    return files


def test_any_file_that_pillow_opens_is_explained(colored: Path, tmp_path: Path) -> None:
    files = picture_files(tmp_path)
    found = explain(colored, list(files.values()), device="cpu")
    plain = found.images[0]
    for name, image in zip(files, found.images, strict=True):
        if name == "gray16.png":
            luma = (plain * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
            assert (image - luma).abs().max() < 0.01
        else:
            lossy = name in ("exif.jpg", "palette.png", "cmyk.jpg", "jpeg2000.jp2")
            assert (image - plain).abs().mean() < (0.02 if lossy else 1e-6), name
        assert (image[:, :, 0].mean() < 0.2) == (plain[:, :, 0].mean() < 0.2), f"{name} stands upright"


def test_colours_become_grey_for_a_model_of_grey_images(finished: Path, tmp_path: Path) -> None:
    files = picture_files(tmp_path)
    found = explain(finished, [files["plain.png"], files["gray16.png"]], device="cpu")
    assert found.images.shape == (2, 1, SIZE, SIZE)
    assert (found.images[0] - found.images[1]).abs().max() < 0.01


def test_the_overlay_has_the_images_full_size_and_dims_what_was_not_seen(colored: Path, tmp_path: Path) -> None:
    image = Image.new("RGB", (600, 400), (200, 40, 40))
    image.save(tmp_path / "wide.png")
    found = explain(colored, [tmp_path / "wide.png"], target="cold", device="cpu")
    drawn = panel(found, 0)
    predicted = int(found.predicted[0])
    pictures = 2 if found.classes[predicted] == "cold" else 3
    assert drawn.width == pictures * 600 + (pictures + 1) * 8
    assert drawn.height > 400
    assert drawn.getpixel((8 + 300, 8 + 200)) == (200, 40, 40), "the image itself comes first"
    # The second picture: its left edge lies outside the central square.
    assert min(drawn.getpixel((8 + 600 + 8 + 10, 8 + 200))) > 120  # type: ignore[operator, type-var]


def test_the_overlay_is_brightest_where_the_map_is(tmp_path: Path) -> None:
    cam = torch.zeros(4, 4)
    cam[1, 2] = 1
    drawn = np.asarray(overlay(Image.new("RGB", (64, 64), "black"), cam, (0, 0, 64, 64))).sum(2)
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert abs(int(row) - 24) <= 1
    assert abs(int(column) - 40) <= 1


# What is written -----------------------------------------------------------------------------------------


def test_the_command_writes_pictures_and_files_for_programs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["explain", str(finished), "--index", "0:5", "7", "--device", "cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "6 pictures" in said
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(f"test-{n:03}.png" for n in (0, 1, 2, 3, 4, 7)), "explanations.json", "explanations.npz"]
    )
    entries = json.loads((out / "explanations.json").read_text())
    arrays = np.load(out / "explanations.npz")
    found = explain(finished, indices=[0, 1, 2, 3, 4, 7], device="cpu")
    assert np.array_equal(arrays["predicted_maps"], found.predicted_maps.numpy())
    assert arrays["ssim"].shape == (6, 10)
    for place, entry in enumerate(entries):
        assert entry["predicted"] == str(int(found.predicted[place]))
        assert entry["confidence"] == pytest.approx(float(found.confidence[place]))
        assert Image.open(out / entry["picture"]).width > 224
        assert set(entry["prototypes"]) == set("0123456789")
        assert next(iter(entry["prototypes"])) == str(int(found.l1[place].argmin()))


def test_without_images_the_command_draws_the_classes(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in finished.iterdir()}
    for number in (1, 2):
        assert run(["explain", str(finished), "--device", "cpu"]) == 0
        folder = finished / f"explanations-{number}"
        assert {path.name for path in folder.iterdir()} == {"class_maps.png", "class_maps.json", "class_maps.npz"}
    assert {path.name for path in finished.iterdir()} == before | {"explanations-1", "explanations-2"}
    entries = json.loads((folder / "class_maps.json").read_text())
    assert sum(entry["all"]["images"] for entry in entries) == 359
    assert all(entry["all"]["images"] == entry["right"]["images"] + entry["wrong"]["images"] for entry in entries)


def test_a_sheet_holds_all_images(finished: Path, tmp_path: Path) -> None:
    arguments = ["--index", "0:50", "--sheet", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert run(["explain", str(finished), *arguments]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["sheet-1.png", "sheet-2.png"]


def test_files_of_one_name_do_not_overwrite_each_other(colored: Path, tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "x <y>.png")
        Image.new("RGB", (40, 40), "red").save(paths[-1])
    explanations = explain(colored, paths, device="cpu")
    pictures = save_explanations(explanations, tmp_path / "out")
    assert [picture.name for picture in pictures] == ["1-x__y_.png", "2-x__y_.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.png"], "missing.png cannot be read"),
        (["text.png"], "text.png cannot be read"),
        (["--index", "359"], "there is no image 359: the test set has 359"),
        (["--index", "5:5"], "there is no image in slice"),
        (["--index", "many"], "--index"),
        (["--index", "1", "text.png"], "--index"),
        (["text.png", "--split", "test"], "choose"),
        (["--target", "3"], "--target is for image files"),
        (["good.png", "--target", "eleven"], "unknown class 'eleven'"),
        (["--sheet"], "--sheet is for single images"),
        (["--index", "0", "--layer", "conv9"], "conv9"),
        (["--index", "0", "--out", "."], "exists already"),
        (["--index", "0", "--dataset", "cifar"], "unknown dataset"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    finished: Path,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("not an image")
    Image.new("L", (20, 20), 200).save(tmp_path / "good.png")
    before = sorted(tmp_path.iterdir())
    default_out = [] if "--out" in arguments else ["--out", "out"]
    assert run(["explain", str(finished), *arguments, "--device", "cpu", *default_out]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_an_image_that_vanishes_leaves_no_half_made_folder(colored: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (40, 40), "red").save(path)
    explanations = explain(colored, [path], device="cpu")
    path.unlink()
    with pytest.raises(InputError, match=r"x\.png cannot be read"):
        save_explanations(explanations, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_images_is_explained(finished: Path) -> None:
    images = torch.rand(3, 1, SIZE, SIZE)
    found = explain(finished, images, device="cpu")
    assert isinstance(found, Explanations)
    assert found.targets is None
    assert found.target_maps is None
    with pytest.raises(InputError, match="before normalisation"):
        explain(finished, images * 3 - 1)
    with pytest.raises(InputError, match=r"shape \(N, 1, 16, 16\)"):
        explain(finished, images[:, :, :8])


def test_weights_that_are_not_finite_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(finished, broken, ignore=shutil.ignore_patterns("explanations*"))
    path = broken / "model.safetensors"
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    weights["network.fc2.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata)
    before = {file: file.stat().st_mtime_ns for file in broken.rglob("*")}
    for command in (["evaluate", str(broken)], ["explain", str(broken), "--index", "0"]):
        assert run([*command, "--device", "cpu"]) == 2
        assert "network.fc2.weight holds weights that are not finite" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in broken.rglob("*")} == before


def test_a_full_disk_is_one_line_and_leaves_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explanations = explain(finished, indices=[slice(0, 30)], device="cpu")
    written: list[Path] = []

    def full(self: Image.Image, path: Path, *arguments: Any, **options: Any) -> None:
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(b"")
        written.append(path)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match="out cannot be written: No space left on device"):
        save_explanations(explanations, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert len(written) < 10, "the rest is not tried"


def test_names_as_long_as_file_systems_allow_are_shortened(colored: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{'é' * 124}.png"  # 252 bytes
    Image.new("RGB", (40, 40), "red").save(path)
    (picture,) = save_explanations(explain(colored, [path], device="cpu"), tmp_path / "out")
    assert picture.name == f"{'é' * 100}.png"


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (7, 300)])
def test_a_thin_strip_is_drawn_without_growing_out_of_bounds(
    colored: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "strip.png")
    found = explain(colored, tmp_path / "strip.png", device="cpu")
    for side in (None, 112):
        drawn = panel(found, 0, side)
        assert max(drawn.size) < 4 * 3000


def test_a_name_that_is_not_utf8_is_explained(colored: Path, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9.png"))
    Image.new("RGB", (40, 40), "red").save(path)
    (picture,) = save_explanations(explain(colored, [path], device="cpu"), tmp_path / "out")
    assert picture.is_file()
    (entry,) = json.loads((tmp_path / "out/explanations.json").read_text())
    assert Path(entry["file"]) == path


def test_no_image_at_all_is_refused(finished: Path) -> None:
    with pytest.raises(InputError, match="no image is named"):
        explain(finished, [], device="cpu")


def test_prototypes_of_another_run_are_refused(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished, other, ignore=shutil.ignore_patterns("explanations*"))
    for tensors in ({"valid": torch.zeros(9, SIZE, SIZE)}, {"train": torch.zeros(10, SIZE, SIZE)}):
        save_file(tensors, other / "prototypes.safetensors")
        with pytest.raises(InputError, match=r"prototypes\.safetensors is of other|cannot be read"):
            load_run(other)
