import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from distributed_batchcam.data import Loader, foreground, load_data, load_masks, patches
from distributed_batchcam.data.decoys import patch_shares
from distributed_batchcam.data.image_files import read_square
from distributed_batchcam.data.images import FileImages, TensorImages
from distributed_batchcam.data.loader import Batch
from distributed_batchcam.errors import InputError, OneRankError

CLASSES = ("T-shirt/top", "Ankle boot", "7")


def batch_of(images, targets=None, indices=None):
    indices = torch.arange(len(images)) if indices is None else indices
    targets = torch.zeros(len(images), dtype=torch.long) if targets is None else targets
    return Batch(images, targets.to(images.device), indices, len(images))


def image_set(count, channels=1, size=4):
    return TensorImages(torch.zeros(count, channels, size, size, dtype=torch.uint8), torch.zeros(count).long())


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def check_is_mask_of(mask, batch):
    assert mask.shape == (len(batch.images), *batch.images.shape[2:])
    assert mask.dtype == torch.bool
    assert mask.device == batch.images.device


# --- foreground --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_foreground_is_what_is_brighter(device, channels):
    images = torch.rand(5, channels, 6, 6, device=device)
    mask = foreground(image_set(5, channels, 6), 0.4)(batch_of(images))
    check_is_mask_of(mask, batch_of(images))
    for n in range(5):
        for row in range(6):
            for column in range(6):
                value = sum(float(images[n, channel, row, column]) for channel in range(channels)) / channels
                assert bool(mask[n, row, column]) == (value > 0.4)


def test_foreground_is_above_its_threshold_and_may_be_empty():
    images = torch.tensor([[[[0.1, 0.11], [0.0, 1.0]]], [[[0.1, 0.05], [0.0, 0.0]]]])
    mask = foreground(image_set(2, size=2))(batch_of(images))
    assert mask.tolist() == [[[False, True], [False, True]], [[False, False], [False, False]]]
    mask = foreground(image_set(2, size=2), 0.5)(batch_of(images))
    assert mask.tolist() == [[[False, False], [False, True]], [[False, False], [False, False]]]


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(InputError, match="threshold of the foreground must be from 0 to below 1"):
        foreground(image_set(1), threshold)


@pytest.mark.parametrize(("size", "threshold"), [(28, 0.5), (28, 0.1), (45, 0.05), (14, 0.05)])
def test_a_patch_is_no_foreground(device, size, threshold):
    plain = load_data("digits", image_size=28, limit=40).train.resized(size)  # as decoys are: through 28
    decoy = load_data("decoy_digits", image_size=size, limit=40).train
    (before,), (after,) = (list(Loader(images, 40, device).epoch()) for images in (plain, decoy))
    mask = foreground(decoy, threshold)(after)
    expected = foreground(plain, threshold)(before)
    for n, corner in enumerate(decoy.corners.tolist()):
        expected[n][(patch_shares(size)[corner] > 0).to(device)] = False
    assert torch.equal(mask, expected)
    assert not (mask & patches(decoy)(after)).any()
    assert mask.any()


# --- patches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"limit": 30}, {"valid_size": 0}])
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_patches_are_where_the_decoy_differs_from_the_plain_image(device, options, part):
    plain = getattr(load_data("digits", image_size=28, **options), part)
    decoy = getattr(load_data("decoy_digits", **options), part)
    for rank in range(2):
        loader = Loader(decoy, 25, device, rank=rank, world_size=2, shuffle=True, seed=3)
        batch = next(loader.epoch())
        mask = patches(decoy)(batch)
        check_is_mask_of(mask, batch)
        assert mask.sum((1, 2)).tolist() == [16] * len(mask)
        before = plain.images[batch.indices, 0].to(device).float() / 255
        differs = batch.images[:, 0] != before
        assert differs.any()
        assert not (differs & ~mask).any()
        values = batch.images[:, 0][mask].view(-1, 16)
        assert torch.equal(values.amin(1), values.amax(1))


@pytest.mark.parametrize(("size", "pixels"), [(6, 1), (14, 4), (56, 64)])
def test_patches_are_resized_with_their_images(size, pixels):
    decoy = load_data("decoy_digits", image_size=size, limit=20).test
    (batch,) = Loader(decoy, 20, torch.device("cpu")).epoch()
    mask = patches(decoy)(batch)
    assert mask.sum((1, 2)).tolist() == [pixels] * 20
    for corner, inside in zip(decoy.corners.tolist(), mask, strict=True):
        rows, columns = (slice(-9, None) if last else slice(9) for last in divmod(corner, 2))
        assert inside[rows, columns].sum() == pixels


def test_images_without_patches_are_refused():
    with pytest.raises(InputError, match=r"no patches; the data sets named decoy_"):
        patches(load_data("digits", limit=10).test)


def test_empty_share_of_a_batch_has_no_mask(tmp_path):
    decoy = load_data("decoy_digits", limit=10).test
    save(tmp_path / "0.png", [[255]])
    share = batch_of(torch.zeros(0, 1, 28, 28))
    for masks in (foreground(decoy), patches(decoy), load_masks(tmp_path, decoy, ("0",))):
        check_is_mask_of(masks(share), share)


# --- masks per class ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name in ("T-shirt_top.png", "ankle_boot.BMP", "7.png"):
        save(tmp_path / "masks" / name, random.choice([0, 255], (12, 12)))
    return tmp_path / "masks"


def test_masks_of_classes_go_by_target(folder, device):
    (folder / "readme.txt").touch()
    (folder / ".hidden.png").touch()
    targets = torch.tensor([2, 0, 0, 1])
    batch = batch_of(torch.rand(4, 1, 12, 12, device=device), targets)
    mask = load_masks(folder, image_set(4, size=12), CLASSES)(batch)
    check_is_mask_of(mask, batch)
    files = ("T-shirt_top.png", "ankle_boot.BMP", "7.png")
    for n, target in enumerate(targets.tolist()):
        expected = np.asarray(Image.open(folder / files[target])) > 0
        assert torch.equal(mask[n].cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize("size", [5, 30])
def test_masks_are_cropped_and_resized_as_images_are(folder, size):
    pixels = np.zeros((12, 20, 3))
    pixels[:, 4:16] = np.random.default_rng(1).integers(0, 256, (12, 12, 1))
    pixels[:, :4] = pixels[:, 16:] = 255
    save(folder / "7.png", pixels)
    mask = load_masks(folder, image_set(1, size=size), CLASSES)(
        batch_of(torch.rand(1, 1, size, size), torch.tensor([2]))
    )
    values = read_square(folder / "7.png", size)[0]
    assert torch.equal(mask[0], values >= 128)
    assert 0 < mask.sum() < size * size


def test_colours_are_averaged_and_transparent_is_outside(folder):
    rgba = [[[255, 255, 255, 255], [255, 255, 255, 0]], [[255, 0, 0, 255], [255, 255, 0, 255]]]
    save(folder / "7.png", rgba)
    mask = load_masks(folder, image_set(1, size=2), CLASSES)(batch_of(torch.rand(1, 1, 2, 2), torch.tensor([2])))
    assert mask.tolist() == [[[True, False], [False, True]]]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*gone"):
        load_masks(tmp_path / "gone", image_set(1), CLASSES)


def test_missing_file_is_named(folder):
    (folder / "T-shirt_top.png").unlink()
    with pytest.raises(InputError, match=r"no mask of class T-shirt/top; .* T-shirt_top\.png"):
        load_masks(folder, image_set(1), CLASSES)


def test_folder_without_files_wants_one_per_class(tmp_path):
    with pytest.raises(InputError, match=r"no mask of class T-shirt/top, Ankle boot, 7; "):
        load_masks(tmp_path, image_set(1), CLASSES)


def test_file_of_no_class_is_named(folder):
    shutil.copy(folder / "7.png", folder / "sandle.png")
    with pytest.raises(InputError, match=r"sandle\.png, of no class"):
        load_masks(folder, image_set(1), CLASSES)


def test_second_file_of_a_class_is_named(folder):
    shutil.copy(folder / "7.png", folder / "7.jpg")
    with pytest.raises(InputError, match=r"several masks of one class: 7\.jpg, 7\.png"):
        load_masks(folder, image_set(1), CLASSES)


@pytest.mark.parametrize("value", [0, 1, 127])
def test_empty_mask_is_named(folder, value):
    save(folder / "7.png", np.full((9, 13), value))
    with pytest.raises(InputError, match=r"7\.png is empty: nothing in it is brighter than half"):
        load_masks(folder, image_set(1), CLASSES)


def test_unreadable_mask_is_named(folder):
    (folder / "7.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"7\.png cannot be read"):
        load_masks(folder, image_set(1), CLASSES)


# --- masks per image ---------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path, write_images):
    """Images of uneven sides, one of them in a folder of its own."""
    root = write_images(tmp_path / "images", count=12)
    random = np.random.default_rng(5)
    save(root / "cat" / "more" / "0.png", random.integers(0, 256, (20, 31, 3)))
    save(root / "dog" / "3.png", random.integers(0, 256, (17, 9, 3)))
    return root


@pytest.fixture
def drawn(root, tmp_path):
    """As the mask of each image, the image itself, in another format."""
    for path in root.rglob("*.png"):
        mask = tmp_path / "drawn" / path.relative_to(root).with_suffix(".BMP")
        save(mask, np.asarray(Image.open(path)))
    return tmp_path / "drawn"


@pytest.mark.parametrize(("cache", "kind"), [("yes", TensorImages), ("no", FileImages)])
def test_masks_of_images_go_by_place_and_are_cropped_and_resized_alike(root, drawn, device, cache, kind):
    save(drawn / "cat" / "of no image.png", [[255]])
    (drawn / "cat" / "notes.txt").touch()
    (drawn / "cat" / ".0.png").touch()
    data = load_data("imagefolder", data_root=root, image_size=8, cache_images=cache)
    for images in (data.train, data.valid, data.test, data.train.subset(torch.tensor([7, 1, 4]))):
        assert isinstance(images, kind)
        masks = load_masks(drawn, images, data.classes)
        for batch in Loader(images, 5, device, shuffle=True).epoch():
            mask = masks(batch)
            check_is_mask_of(mask, batch)
            grey = (batch.images * 255).round().mean(1)
            assert torch.equal(mask, grey > 127.5)


def test_masks_are_found_below_the_part(root, drawn, write_images):
    for part in ("train", "test"):
        shutil.copytree(root / "cat", root / part / "cat")
        shutil.copytree(root / "dog", root / part / "dog")
    data = load_data("imagefolder", data_root=root, image_size=8, limit=9)
    for images in (data.train, data.valid, data.test):
        (batch,) = Loader(images, 9, torch.device("cpu")).epoch()
        mask = load_masks(drawn, images, data.classes)(batch)
        assert torch.equal(mask, (batch.images * 255).round().mean(1) > 127.5)


def test_masks_per_class_serve_image_folders_too(root, tmp_path):
    save(tmp_path / "drawn" / "cat.png", [[255, 0], [0, 0]])
    save(tmp_path / "drawn" / "dog.png", [[0, 255], [0, 0]])
    images = load_data("imagefolder", data_root=root, image_size=2).test
    (batch,) = Loader(images, 9, torch.device("cpu")).epoch()
    mask = load_masks(tmp_path / "drawn", images, ("cat", "dog"))(batch)
    assert [row[0].tolist() for row in mask] == [[not target, bool(target)] for target in images.targets]


def test_missing_masks_are_counted_and_the_first_named(root, drawn):
    images = load_data("imagefolder", data_root=root, image_size=8, valid_size=0).train
    paths = [path.relative_to(root).with_suffix(".BMP") for path in images.files.paths]
    for path in paths[2:4]:
        (drawn / path).unlink()
    wanted = paths[2].with_suffix("")
    with pytest.raises(InputError, match=rf"no mask of 2 of {len(images)} images; the first would be {wanted}\.png"):
        load_masks(drawn, images, ("cat", "dog"))
    shutil.rmtree(drawn)
    drawn.mkdir()
    with pytest.raises(InputError, match=rf"no mask of {len(images)} of .* draw one per class, cat\.png"):
        load_masks(drawn, images, ("cat", "dog"))


def test_several_masks_of_an_image_are_named(root, drawn):
    shutil.copy(drawn / "cat" / "3.BMP", drawn / "cat" / "3.bmp.png")  # of another image
    shutil.copy(drawn / "cat" / "3.BMP", drawn / "cat" / "3.png")
    images = load_data("imagefolder", data_root=root, image_size=8).test
    with pytest.raises(InputError, match=r"3\.BMP and 3\.png would be masks of one image"):
        load_masks(drawn, images, ("cat", "dog"))


def test_images_that_would_share_a_mask_are_named(root, drawn):
    shutil.copy(root / "cat" / "3.png", root / "cat" / "3.bmp")
    images = load_data("imagefolder", data_root=root, image_size=8, valid_size=0, cache_images="no")
    everything = FileImages(root, images.train.paths + images.test.paths, torch.zeros(26).long(), 8)
    with pytest.raises(InputError, match=r"cat/3\.\w+ and 3\.\w+ would share the mask cat/3; rename one"):
        load_masks(drawn, everything, ("cat", "dog"))


def test_bad_mask_of_images_in_memory_is_named_at_once(root, drawn):
    save(drawn / "cat" / "0.BMP", [[0]])
    images = FileImages(root, [root / "cat" / f"{n}.png" for n in range(3)], torch.zeros(3).long(), 8)
    with pytest.raises(InputError, match=r"mask .*cat/0\.BMP is empty"):
        load_masks(drawn, images.decoded(), ("cat", "dog"))


def test_mask_that_is_empty_or_damaged_is_named_when_it_is_read(root, drawn):
    """By the one rank whose share it is in."""
    save(drawn / "cat" / "0.BMP", [[0]])
    (drawn / "cat" / "1.BMP").write_bytes(b"no image")
    images = FileImages(root, [root / "cat" / f"{n}.png" for n in range(3)], torch.zeros(3).long(), 8)
    masks = load_masks(drawn, images, ("cat", "dog"))
    pixels = torch.rand(1, 3, 8, 8)
    masks(batch_of(pixels, indices=torch.tensor([2])))
    with pytest.raises(OneRankError, match=r"mask .*cat/0\.BMP is empty"):
        masks(batch_of(pixels, indices=torch.tensor([0])))
    with pytest.raises(OneRankError, match=r"cat/1\.BMP cannot be read"):
        masks(batch_of(pixels, indices=torch.tensor([1])))
