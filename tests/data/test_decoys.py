import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import chi2_contingency, chisquare

from distributed_batchcam.data import DATASETS, load_data
from distributed_batchcam.data.decoys import patch_shares, with_patches
from distributed_batchcam.data.images import Parts, TensorImages
from distributed_batchcam.errors import InputError

PARTS = ("train", "valid", "test")
DECOYS = ("decoy_digits", "decoy_mnist", "decoy_fashion_mnist")
CLASSES = tuple("0123456789")


@pytest.fixture
def root(tmp_path, write_mnist):
    write_mnist(tmp_path, "MNIST")
    return write_mnist(tmp_path, "FashionMNIST")


def in_patch(corner, row, column):
    """Corners are numbered as one reads: top left, top right, bottom left, bottom right."""
    rows, columns = (range(24, 28) if last else range(4) for last in divmod(corner, 2))
    return row in rows and column in columns


CORNER_PIXELS = torch.tensor([[[in_patch(c, row, col) for col in range(28)] for row in range(28)] for c in range(4)])


def patch_value(decoy, plain, corner):
    """The one value in the patch of an image (28, 28) that is otherwise the plain one, pixel by pixel."""
    values = set()
    for row in range(28):
        for column in range(28):
            if in_patch(corner, row, column):
                values.add(int(decoy[row, column]))
            else:
                assert decoy[row, column] == plain[row, column]
    (value,) = values
    return value


def rows(part):
    return {(image.numpy().tobytes(), int(target)) for image, target in zip(part.images, part.targets, strict=True)}


# --- the protocol ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECOYS)
def test_every_image_is_the_plain_one_with_a_patch_in_its_corner(root, name):
    plain = load_data(name.removeprefix("decoy_"), data_root=root, image_size=28, limit=150)
    decoy = load_data(name, data_root=root, limit=150)
    for part in PARTS:
        before, after = getattr(plain, part), getattr(decoy, part)
        assert torch.equal(before.targets, after.targets)
        pairs = zip(after.images.numpy(), before.images.numpy(), after.corners, after.targets, strict=True)
        for image, original, corner, target in pairs:
            value = patch_value(image[0], original[0], int(corner))
            if part == "test":
                assert value in range(30, 256, 25)
            else:
                assert value == 255 - 25 * int(target)


def test_patches_of_colour_images_are_grey():
    parts = with_patches(
        Parts(("a", "b"), *(TensorImages(torch.zeros(9, 3, 28, 28, dtype=torch.uint8), torch.ones(9).long()),) * 2)
    )
    assert torch.equal(parts.train.images.count_nonzero((2, 3)), torch.full((9, 3), 16))
    assert parts.train.images.unique().tolist() == [0, 230]


@pytest.fixture(scope="module")
def blank():
    """Many black images with patches."""
    images = TensorImages(torch.zeros(10_000, 1, 28, 28, dtype=torch.uint8), torch.arange(10_000) % 10)
    return with_patches(Parts(CLASSES, images, images))


def decoy_labels(part):
    return (255 - part.images.flatten(1).amax(1).long()) // 25


def counts(first, second):
    return torch.bincount(10 * first + second, minlength=100).view(10, 10).numpy()


@pytest.mark.parametrize("part", ["train", "test"])
def test_corners_are_uniform_and_independent_of_the_class(blank, part):
    images = getattr(blank, part)
    assert chisquare(torch.bincount(images.corners).numpy()).pvalue > 0.01
    assert chi2_contingency(counts(images.targets, images.corners)[:, :4]).pvalue > 0.01


def test_decoy_labels_are_uniform_and_independent_of_class_and_corner_in_the_test(blank):
    labels = decoy_labels(blank.test)
    assert labels.unique().tolist() == list(range(10))
    assert chisquare(torch.bincount(labels).numpy()).pvalue > 0.01
    assert chi2_contingency(counts(blank.test.targets, labels)).pvalue > 0.01
    assert chi2_contingency(counts(labels, blank.test.corners)[:, :4]).pvalue > 0.01
    assert torch.equal(decoy_labels(blank.train), blank.train.targets)


def test_training_and_test_images_have_corners_of_their_own(blank):
    agree = (blank.train.corners == blank.test.corners).float().mean()
    assert float(agree) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("held_out", ["valid", "test"])
def test_corners_are_independent_of_what_is_held_out(held_out):
    data = load_data("decoy_digits")
    corners = torch.stack([torch.bincount(part.corners) for part in (data.train, getattr(data, held_out))])
    assert chi2_contingency(corners.numpy()).pvalue > 0.01


@pytest.mark.parametrize("name", ["decoy_mnist", "decoy_fashion_mnist"])
def test_the_real_images_follow_the_protocol(name):
    root, folder = os.environ.get("BATCHCAM_DATA"), {"decoy_mnist": "MNIST"}.get(name, "FashionMNIST")
    if not root or not Path(root, folder).is_dir():
        pytest.skip(f"needs the real {folder} in $BATCHCAM_DATA")
    plain, decoy = load_data(name.removeprefix("decoy_")), load_data(name)
    assert [len(decoy.train), len(decoy.valid), len(decoy.test)] == [55_000, 5_000, 10_000]
    for part in PARTS:
        before, after = getattr(plain, part), getattr(decoy, part)
        patch = CORNER_PIXELS[after.corners]
        assert torch.equal(before.targets, after.targets)
        assert torch.equal(after.images[:, 0][~patch], before.images[:, 0][~patch])
        values = after.images[:, 0][patch].view(-1, 16).long()
        assert torch.equal(values, values[:, :1].expand(-1, 16))
        labels = (255 - values[:, 0]) // 25
        assert torch.equal(values[:, 0], 255 - 25 * labels)
        assert chisquare(torch.bincount(after.corners).numpy()).pvalue > 0.01
        if part == "test":
            assert chisquare(torch.bincount(labels).numpy()).pvalue > 0.01
            assert chi2_contingency(counts(after.targets, labels)).pvalue > 0.01
        else:
            assert torch.equal(labels, after.targets)


# --- they belong to the data -------------------------------------------------------------------------------


def test_the_choices_are_these_for_good():
    data = load_data("decoy_digits", valid_size=0)
    assert data.train.corners[:12].tolist() == [1, 3, 0, 0, 3, 1, 3, 1, 3, 0, 0, 1]
    assert data.test.corners[:12].tolist() == [0, 2, 1, 2, 0, 2, 2, 0, 2, 0, 2, 0]
    patches = (data.test.images[i, 0][CORNER_PIXELS[c]].unique() for i, c in enumerate(data.test.corners[:12]))
    assert [(255 - int(value)) // 25 for value in patches] == [3, 5, 6, 8, 6, 9, 8, 3, 3, 2, 5, 8]


def test_patches_depend_on_nothing_but_the_data():
    torch.manual_seed(1)
    whole = load_data("decoy_digits")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = load_data("decoy_digits")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(getattr(whole, part).images, getattr(again, part).images) for part in PARTS)
    limited = load_data("decoy_digits", limit=40)
    assert all(rows(getattr(limited, part)) < rows(getattr(whole, part)) for part in PARTS)
    unsplit = load_data("decoy_digits", valid_size=0)
    assert unsplit.valid is unsplit.test
    assert rows(unsplit.train) == rows(whole.train) | rows(whole.valid)
    assert rows(unsplit.test) == rows(whole.test)


def test_the_rest_is_as_in_the_plain_data_set():
    for name in DECOYS:
        plain, decoy = DATASETS[name.removeprefix("decoy_")], DATASETS[name]
        for field in ("channels", "image_size", "mean", "std", "on_disk", "downloads", "foreground"):
            assert getattr(plain, field) == getattr(decoy, field)
    assert load_data("decoy_digits").classes == CLASSES
    plain = load_data("digits")
    assert all(getattr(plain, part).corners is None for part in PARTS)


# --- other image sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, 14, 45])
def test_image_and_patch_are_resized_together(size):
    native = load_data("decoy_digits", limit=30)
    resized = load_data("decoy_digits", limit=30, image_size=size)
    for part in PARTS:
        before, after = getattr(native, part), getattr(resized, part)
        exact = F.interpolate(before.images.double(), size=(size, size), mode="bilinear", antialias=True)
        assert (after.images.double() - exact).abs().max() <= 0.5 + 1e-4
        assert torch.equal(after.corners, before.corners)


@pytest.mark.parametrize("size", [6, 14, 28, 45, 112])
def test_shares_are_those_of_pillow(size):
    for corner, share in enumerate(patch_shares(size)):
        native = Image.fromarray(CORNER_PIXELS[corner].float().numpy())
        image = native.resize((size, size), Image.Resampling.BILINEAR)
        torch.testing.assert_close(share, torch.from_numpy(np.array(image)), rtol=0, atol=1e-5)


def test_image_too_small_for_the_patch_is_refused():
    with pytest.raises(InputError, match="patch of a decoy data set is lost in 5×5 pixels; choose 6 or more"):
        load_data("decoy_digits", image_size=5)
    assert (patch_shares(5) >= 0.5).sum() == 0
    assert (patch_shares(6) >= 0.5).flatten(1).any(1).all()
