import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from distributed_batchcam.data import load_prototypes, save_prototype_images
from distributed_batchcam.errors import InputError

CLASSES = ("T-shirt/top", "Ankle boot", "7")


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name in ("T-shirt_top.png", "ankle_boot.BMP", "7.png"):
        Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def test_files_are_found_by_class_in_the_order_of_the_classes(folder):
    (folder / "readme.txt").touch()
    (folder / ".hidden.png").touch()
    (folder / "old.png").mkdir()
    prototypes = load_prototypes(folder, CLASSES, 12)
    assert prototypes.shape == (3, 12, 12)
    assert prototypes.dtype == torch.float32
    for prototype, name in zip(prototypes, ("T-shirt_top.png", "ankle_boot.BMP", "7.png"), strict=True):
        expected = np.asarray(Image.open(folder / name)).mean(2) / 255
        torch.testing.assert_close(prototype.double(), torch.from_numpy(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [5, 30])
def test_prototypes_are_resized_smoothly(folder, size):
    gray = torch.from_numpy(np.asarray(Image.open(folder / "7.png")).mean(2) / 255)
    expected = F.interpolate(gray[None, None], size=(size, size), mode="bilinear", antialias=True)[0, 0]
    read = load_prototypes(folder, CLASSES, size)[2]
    torch.testing.assert_close(read.double(), expected, rtol=0, atol=1e-6)


def test_values_are_kept_as_they_are_and_within_range(folder):
    Image.fromarray(np.array([[51, 102], [102, 255]], dtype=np.uint8)).save(folder / "7.png")
    read = load_prototypes(folder, CLASSES, 2)[2]
    torch.testing.assert_close(read, torch.tensor([[0.2, 0.4], [0.4, 1.0]]))
    assert read.max() <= 1


def test_central_square_of_an_oblong_image(folder):
    pixels = np.zeros((4, 8), dtype=np.uint8)
    pixels[:, 2:6] = np.arange(16).reshape(4, 4)
    pixels[:, :2] = pixels[:, 6:] = 255
    Image.fromarray(pixels).save(folder / "7.png")
    torch.testing.assert_close(
        load_prototypes(folder, CLASSES, 4)[2], torch.arange(16.0).view(4, 4) / 255, rtol=0, atol=1e-6
    )


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*gone"):
        load_prototypes(tmp_path / "gone", CLASSES, 8)


def test_missing_files_are_named(folder):
    (folder / "T-shirt_top.png").unlink()
    (folder / "7.png").unlink()
    with pytest.raises(InputError, match=r"no prototype of class T-shirt/top, 7; .* T-shirt_top\.png"):
        load_prototypes(folder, CLASSES, 8)


def test_file_of_no_class_is_named(folder):
    shutil.copy(folder / "7.png", folder / "sandle.png")
    with pytest.raises(InputError, match=r"sandle\.png, of no class"):
        load_prototypes(folder, CLASSES, 8)


@pytest.mark.parametrize("second", ["7.jpg", "Ankle boot.png"])
def test_second_file_of_a_class_is_named(folder, second):
    shutil.copy(folder / "7.png", folder / second)
    with pytest.raises(InputError, match=f"several prototypes of one class: .*{second}"):
        load_prototypes(folder, CLASSES, 8)


def test_classes_that_would_share_a_file_are_named(folder):
    with pytest.raises(InputError, match="'a b', 'A/B' would share"):
        load_prototypes(folder, ("a b", "A/B"), 8)


def test_unreadable_file_is_named(folder):
    (folder / "7.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"7\.png cannot be read"):
        load_prototypes(folder, CLASSES, 8)


@pytest.mark.parametrize("value", [0, 77, 255])
def test_constant_image_asks_for_nothing(folder, value):
    Image.new("L", (13, 9), value).save(folder / "7.png")
    with pytest.raises(InputError, match=r"7\.png is of one value"):
        load_prototypes(folder, CLASSES, 8)


def test_faint_prototype_is_accepted(folder):
    Image.fromarray(np.array([[7, 8]] * 2, dtype=np.uint8)).save(folder / "7.png")
    assert load_prototypes(folder, CLASSES, 2)[2].unique().numel() == 2


def test_saved_prototypes_are_read_again(tmp_path):
    classes = ("T-shirt/top", "<b>naïve 猫", "a.b", "7", "$\\frac{", "x" * 200)
    prototypes = torch.rand(len(classes), 9, 9)
    save_prototype_images(tmp_path, prototypes, classes)
    assert sorted(path.name for path in tmp_path.iterdir() if path.stem in ("T-shirt_top", "7")) == [
        "7.png",
        "T-shirt_top.png",
    ]
    assert len(list(tmp_path.iterdir())) == len(classes)
    torch.testing.assert_close(load_prototypes(tmp_path, classes, 9), prototypes, rtol=0, atol=0.51 / 255)


def test_classes_that_would_share_a_saved_file_are_named(tmp_path):
    with pytest.raises(InputError, match="'a b', 'A/B' would share a prototype file"):
        save_prototype_images(tmp_path, torch.rand(2, 4, 4), ("a b", "A/B"))
    assert list(tmp_path.iterdir()) == []
