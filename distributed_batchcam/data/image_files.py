"""Decoding of image files, whatever their format and mode, to 8-bit RGB."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from distributed_batchcam.errors import InputError

_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pbm", ".pnm"),
)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: a known extension, not hidden."""
    return not name.startswith(".") and name.lower().endswith(_EXTENSIONS)


def read_square(path: Path, size: int, background: str = "white") -> Tensor:
    """The central square of an image file, resized (bilinear, antialias): uint8 (3, size, size).

    The same as resizing the shorter side to `size` and cropping the centre, without the gigabytes that
    the resized long side of a thin strip would take.

    Raises:
        InputError: see `read_rgb`.
    """
    image = read_rgb(path, background)
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_rgb(path: Path, background: str = "white") -> Image.Image:
    """The first frame of an image file, upright by its EXIF orientation, on `background` where transparent.

    Raises:
        InputError: missing, unreadable, truncated, of an unknown format or of too many pixels.
    """
    try:
        with Image.open(path, formats=_formats()) as image:
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise _too_large(path)
            return _to_rgb(ImageOps.exif_transpose(image), background)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path) from error
    except Exception as error:  # of a damaged file, Pillow's plugins raise whatever their parser met
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"image {path} cannot be read ({reason}); repair or remove it") from error


@cache
def _formats() -> tuple[str, ...]:
    """All that Pillow reads by itself: Encapsulated PostScript is a program, which it would start Ghostscript for."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def _too_large(path: Path) -> InputError:
    limit = f"{Image.MAX_IMAGE_PIXELS:,}" if Image.MAX_IMAGE_PIXELS else "the allowed number of"
    return InputError(f"image {path} has more than {limit} pixels; scale it down or remove it")


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits to 255 where it should scale them.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit grey values; 8 or 16 bits are supported")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point grey values; 8 or 16 bits are supported")
    if image.has_transparency_data:
        behind = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    return image.convert("RGB")
