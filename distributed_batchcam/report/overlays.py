"""Explained images as pictures: the image, and the maps laid over it at its full size."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import colormaps, get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distributed_batchcam.data.image_files import read_rgb
from distributed_batchcam.explanations import Explanations

LEAST_SIDE = 224  # pixels; smaller images are enlarged by a whole number
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
    scale = side / max(image.size) if side else max(1, -(-LEAST_SIDE // min(image.size)))
    if scale != 1:
        smooth = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        image = image.resize((round(image.width * scale), round(image.height * scale)), smooth)
        left, top, right, bottom = (round(edge * scale) for edge in box)
        box = (left, top, right, bottom)
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
    relevance = Image.fromarray(cam.mul(255).round().byte().numpy()).resize(size, Image.Resampling.BILINEAR)
    heat = relevance.copy()
    heat.putpalette(_palette())
    seen = image.crop(box) if size != image.size else image
    # Where the map is low, the image shows through; where it is high, the colour tells how high.
    colored = Image.composite(heat.convert("RGB"), seen, relevance.point(_opacity()))
    if size == image.size:
        return colored
    result = Image.blend(image, Image.new("RGB", image.size, _PAPER), 0.6)
    result.paste(colored, box[:2])
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
        pixels = explanations.images[index].mul(255).round().byte()
        channels = pixels if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)
        image = Image.fromarray(channels.permute(1, 2, 0).contiguous().numpy())
        return image, (0, 0, image.width, image.height)
    image = read_rgb(source)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image, (left, top, left + side, top + side)


def _side_by_side(pictures: Sequence[Image.Image], captions: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    width, height = pictures[0].size
    text = max(11, min(48, height // 16))
    font = _font(text)
    result = Image.new("RGB", (len(pictures) * (width + _GAP) + _GAP, height + 2 * _GAP + round(1.5 * text)), _PAPER)
    draw = ImageDraw.Draw(result)
    for place, (picture, (caption, color)) in enumerate(zip(pictures, captions, strict=True)):
        left = _GAP + place * (width + _GAP)
        result.paste(picture, (left, _GAP))
        draw.text((left, height + _GAP + text // 4), _fitted(caption, font, width), fill=color, font=font)
    return result


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A caption on one line, cut off where it would run into the next."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


@cache
def _palette() -> bytes:
    colors = colormaps["inferno"](np.linspace(0, 1, 256), bytes=True)[:, :3]
    return bytes(np.ascontiguousarray(colors))


@cache
def _opacity() -> list[int]:
    return [round(80 + 130 * value / 255) for value in range(256)]
