import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from distributed_batchcam.data.image_files import is_image_name, read_rgb, read_square
from distributed_batchcam.errors import InputError


@pytest.fixture
def save(tmp_path):
    def save(image, name="image.png", **options):
        path = tmp_path / name
        image.save(path, **options)
        return path

    return save


def pixels(path):
    image = read_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def random_rgb(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_colours_come_back(save):
    colours = random_rgb(4, 5)
    assert np.array_equal(pixels(save(Image.fromarray(colours))), colours)


def test_grey_becomes_three_equal_channels(save):
    grey = random_rgb(4, 5)[..., 0]
    assert np.array_equal(pixels(save(Image.fromarray(grey))), np.repeat(grey[..., None], 3, axis=2))


def test_black_and_white_is_0_and_255(save):
    image = Image.fromarray(np.array([[True, False]]))
    assert pixels(save(image)).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("name", ["image.png", "image.tif", "image.pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(save, name):
    levels = np.array([[0, 257, 300, 32896, 65534, 65535]], dtype=np.uint16)
    assert pixels(save(Image.fromarray(levels), name))[0, :, 1].tolist() == [0, 1, 1, 128, 255, 255]


@pytest.mark.parametrize("levels", [np.array([[70000]], np.int32), np.array([[0.5]], np.float32)])
def test_grey_values_of_unknown_scale_are_refused(save, levels):
    with pytest.raises(InputError, match=r"image\.tif cannot be read .*8 or 16 bits"):
        read_rgb(save(Image.fromarray(levels), "image.tif"))


def test_transparency_is_put_on_white(save):
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    assert pixels(save(Image.fromarray(rgba))).tolist() == [[[10, 20, 30], [255] * 3, [204] * 3]]


def test_transparent_palette_entry_is_white(save):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert pixels(save(image, transparency=1)).tolist() == [[[10, 20, 30], [255] * 3]]


def test_exif_orientation_turns_the_image(save):
    colours = random_rgb(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 90° clockwise puts it upright
    assert np.array_equal(pixels(save(Image.fromarray(colours), exif=exif)), np.rot90(colours, -1))


def test_first_frame_of_an_animation(save):
    first, second = (Image.new("RGB", (3, 3), colour) for colour in ("red", "blue"))
    path = save(first, "image.gif", save_all=True, append_images=[second])
    assert pixels(path)[0, 0].tolist() == [255, 0, 0]


def test_cmyk_jpeg_is_read(save):
    assert pixels(save(Image.new("CMYK", (8, 8)), "image.jpg")).shape == (8, 8, 3)


@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.tif", "image.webp", "image.gif", "image.bmp"])
def test_truncated_image_is_named(save, name):
    path = save(Image.fromarray(random_rgb(64, 64)), name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_rgb(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_not_an_image_is_named(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"image\.png cannot be read"):
        read_rgb(path)


def test_uncommon_formats_are_read_whatever_the_file_is_called(save):
    path = save(Image.new("L", (9, 9), 77), "image.pcx")
    assert read_rgb(path.rename(path.with_suffix(".png"))).getpixel((4, 4)) == (77, 77, 77)


def test_postscript_is_never_run(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    def fail(*arguments, **options):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", fail)
    path = tmp_path / "image.png"
    Image.new("RGB", (9, 9)).save(path, format="EPS")
    with pytest.raises(InputError, match=r"image\.png cannot be read"):
        read_rgb(path)


def test_missing_image_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png cannot be read"):
        read_rgb(tmp_path / "gone.png")


@pytest.mark.parametrize("limit", [99, 40])  # Pillow warns beyond its limit, and raises beyond twice that
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_decompression_bomb_is_named(save, monkeypatch, limit, action):
    path = save(Image.new("L", (10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        with pytest.raises(InputError, match=rf"image\.png has more than {limit} pixels"):
            read_rgb(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert read_rgb(path).size == (10, 10)


def test_image_of_the_wanted_size_is_not_resampled(save):
    colours = random_rgb(7, 7)
    read = read_square(save(Image.fromarray(colours)), 7)
    assert read.dtype == torch.uint8
    assert torch.equal(read, torch.from_numpy(colours).permute(2, 0, 1))


@pytest.mark.parametrize("shape", [(20, 20), (40, 60), (60, 40), (8, 8), (8, 12)])
def test_square_is_torchvisions_resize_and_centre_crop(save, shape):
    from torchvision.transforms import v2

    image = Image.fromarray(random_rgb(*shape)).resize((shape[1] * 2, shape[0] * 2), Image.Resampling.BICUBIC)
    expected = v2.Compose([v2.Resize(20, antialias=True), v2.CenterCrop(20), v2.PILToTensor()])(image)
    difference = (read_square(save(image), 20).int() - expected.int()).abs()
    if shape[0] == shape[1]:
        assert difference.max() == 0
    # Elsewhere the outermost pixels differ: beyond the crop torchvision's filter still sees the image.
    assert difference[:, 1:-1, 1:-1].max() <= 1


def test_thin_strip_stays_small(save):
    image = Image.new("RGB", (20_000, 1), "red")
    assert read_square(save(image), 512).float().mean((1, 2)).tolist() == [255, 0, 0]


def test_names_of_images():
    assert all(map(is_image_name, ["a.png", "a.JPEG", "a.b.tif", "a.webp"]))
    assert not any(map(is_image_name, ["a.txt", "png", ".png", "._a.jpg", "a.png.bak", "a.eps", "a.pdf"]))
