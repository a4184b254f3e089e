"""Explained images as pictures: the image, and the maps laid over it at its full size."""

from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from matplotlib import colormaps, get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distributed_batchcam.data.image_files import read_rgb
from distributed_batchcam.explanations import Explanations

LEAST_SIDE = 224  # pixels of the longest side; smaller images are enlarged by a whole number
_GAP = 8
_INK, _RIGHT, _WRONG, _PAPER = (34, 34, 34), (22, 110, 60), (176, 32, 32), (255, 255, 255)
_SHEET_COLUMNS, _SHEET_ROWS, _SHEET_SIDE = 4, 12, 112


def panel(explanations: Explanations, index: int, side: int | None = None) -> Image.Image:
    """One image, its map of the predicted class and, where it is another, of the target class, side by side.

    Args:
        explanations: all.
        index: which one.
        side: longest side of the image in pixels; None: as it is, but at least `LEAST_SIDE`.
    """
    image, box = _original(explanations, index)
    # By the longest side: a strip of one pixel would otherwise become hundreds of millions.
    scale = side / max(image.size) if side else max(1, -(-LEAST_SIDE // max(image.size)))
    if scale != 1:
        smooth = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        width, height = (max(1, round(length * scale)) for length in image.size)
        image = image.resize((width, height), smooth)
        left, top = min(round(box[0] * scale), width - 1), min(round(box[1] * scale), height - 1)
        box = (left, top, max(left + 1, round(box[2] * scale)), max(top + 1, round(box[3] * scale)))
    image = image.convert("RGB")
    predicted = int(explanations.predicted[index])
    share = f"{100 * float(explanations.confidence[index]):.1f} %"
    target = None if explanations.targets is None else int(explanations.targets[index])
    color = _INK if target is None else _RIGHT if target == predicted else _WRONG
    pictures = [image, overlay(image, explanations.predicted_maps[index], box)]
    said = "" if side else "predicted "  # small pictures have no room for the word
    captions = [(explanations.names[index], _INK), (f"{said}{explanations.classes[predicted]}, {share}", color)]
    if target is not None and target != predicted:
        assert explanations.target_maps is not None
        pictures.append(overlay(image, explanations.target_maps[index], box))
        share = f"{100 * float(explanations.probabilities[index, target]):.1f} %"
        captions.append((f"target {explanations.classes[target]}, {share}", _INK))
    return _side_by_side(pictures, captions)


def overlay(image: Image.Image, cam: Tensor, box: tuple[int, int, int, int]) -> Image.Image:
    """A map laid over an RGB image.

    Args:
        image: the image.
        cam: (H, W) in [0, 1].
        box: left, top, right and bottom of what the model saw; what is outside is dimmed.
    """
    size = (box[2] - box[0], box[3] - box[1])
    heat = Image.fromarray(np.rint(255 * cam.numpy()).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    heat.putpalette(_palette(), "RGBA")
    heat = heat.convert("RGBA")
    if size == image.size:
        result = image.copy()
    else:
        result = Image.blend(image, Image.new("RGB", image.size, _PAPER), 0.6)
        result.paste(image.crop(box), box[:2])
    result.paste(heat, box[:2], heat)
    return result


def sheets(explanations: Explanations) -> list[Image.Image]:
    """All explanations as small panels on as many sheets as it takes."""
    pages = []
    on_a_page = _SHEET_COLUMNS * _SHEET_ROWS
    for start in range(0, len(explanations), on_a_page):
        cells = [
            panel(explanations, index, _SHEET_SIDE) for index in range(start, min(start + on_a_page, len(explanations)))
        ]
        columns = min(_SHEET_COLUMNS, len(cells))
        width = max(3 * _SHEET_SIDE + 4 * _GAP, *(cell.width for cell in cells))
        height = max(cell.height for cell in cells)
        page = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), _PAPER)
        for place, cell in enumerate(cells):
            row, column = divmod(place, columns)
            page.paste(cell, (column * width, row * height))
        pages.append(page)
    return pages


def _original(explanations: Explanations, index: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The image as it was before the model's preprocessing, and the part of it that the model saw."""
    source = explanations.sources[index]
    if source is None:
        pixels = np.rint(255 * explanations.images[index].numpy()).astype(np.uint8)
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)) if len(pixels) == 3 else pixels[0])
        return image, (0, 0, image.width, image.height)
    image = read_rgb(source)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image, (left, top, left + side, top + side)


def _side_by_side(pictures: Sequence[Image.Image], captions: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    width, height = pictures[0].size
    text = max(11, min(48, height // 16))
    result = Image.new("RGB", (len(pictures) * (width + _GAP) + _GAP, height + 2 * _GAP + round(1.5 * text)), _PAPER)
    for place, (picture, (caption, color)) in enumerate(zip(pictures, captions, strict=True)):
        left = _GAP + place * (width + _GAP)
        result.paste(picture, (left, _GAP))
        result.paste(_caption(caption, color, text, width), (left, height + _GAP))
    return result


@lru_cache(maxsize=64)  # drawing letters takes as long as all the rest, and many images are "7, 100.0 %"
def _caption(text: str, color: tuple[int, int, int], size: int, width: int) -> Image.Image:
    """Text on one line, cut off where it would run into the next picture's."""
    font = _font(size)
    text = " ".join(text.split())
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    strip = Image.new("RGB", (width, round(1.5 * size)), _PAPER)
    ImageDraw.Draw(strip).text((0, size // 4), text, fill=color, font=font)
    return strip


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


@cache
def _palette() -> bytes:
    """Colour and opacity of each value: where a map is low, the image shows through."""
    colors = colormaps["inferno"](np.linspace(0, 1, 256), bytes=True)
    colors[:, 3] = np.linspace(80, 210, 256)
    return colors.tobytes()
