"""Maps and images as PNG data URIs."""

from base64 import b64encode
from functools import cache
from io import BytesIO

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from .overlays import overlay

Array = NDArray[np.floating]

MAP_SIDE, PHOTO_SIDE, STRIP_SIDE = 96, 160, 48  # pixels beyond which a report shows no more detail


def gray(values: Array) -> str:
    """Prototypes (n, h, w) in [0, 1] side by side, in shades of gray."""
    return _uri(_side_by_side(values))


def heat(values: Array) -> str:
    """Maps (n, h, w) in [0, 1] side by side, dark for 0 and bright for 1."""
    return _uri(_coloured(_side_by_side(values)))


def photo(values: Array) -> str:
    """An image (1 or 3, h, w) in [0, 1]."""
    return _uri(_image(values))


def photo_under(values: Array, relevance: Array) -> str:
    """An image (1 or 3, h, w) in [0, 1] under a map (h', w') in [0, 1]."""
    image = _image(values).convert("RGB")
    cam = torch.from_numpy(_cleaned(relevance))
    return _uri(overlay(image, cam, (0, 0, *image.size)))


def _side_by_side(values: Array) -> Image.Image:
    side = MAP_SIDE if len(values) == 1 else STRIP_SIDE
    images = [_fitted(Image.fromarray(_bytes(one)), side) for one in values]
    return Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1))


def _image(values: Array) -> Image.Image:
    pixels = _bytes(values)
    return _fitted(Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2)), PHOTO_SIDE)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    # Small images stay small: the browser enlarges them, pixel by pixel.
    if max(image.size) <= side:
        return image
    scale = side / max(image.size)
    width, height = (max(1, round(scale * length)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _coloured(shades: Image.Image) -> Image.Image:
    image = shades.copy()
    image.putpalette(_palette())
    return image


@cache
def _palette() -> bytes:
    colours = colormaps["inferno"](np.arange(256), bytes=True)
    return bytes(colours[:, :3].tobytes())


def _bytes(values: Array) -> NDArray[np.uint8]:
    return np.rint(255 * _cleaned(values)).astype(np.uint8)


def _cleaned(values: Array) -> NDArray[np.float32]:
    # A damaged file may hold anything.
    return np.nan_to_num(values.astype(np.float32)).clip(0, 1)


def _uri(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, format="png", optimize=False)
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode()
