"""Prototypes against class maps as one small picture, for trackers that get one every epoch."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_SIDE = 64  # pixels of a map, about
_COLUMNS = 10
_CLASSES = 100  # beyond which nobody looks, and every epoch would cost megabytes
_GAP = 4
_PAPER = 255


def class_panel(prototypes: Tensor, maps: Tensor) -> NDArray[np.uint8]:
    """Prototypes in gray above class maps in colour, a column per class, in bands of ten classes.

    Drawn without matplotlib's figures, which take a second: pixels are repeated or left out.

    Args:
        prototypes: (C, h, w) in [0, 1].
        maps: (C, h, w) in [0, 1].

    Returns:
        The picture (H, W, 3) of the first hundred classes.
    """
    from matplotlib import colormaps

    colours = colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
    gray = np.repeat(_cells(prototypes)[..., None], 3, axis=3)
    pairs = np.concatenate([gray, colours[_cells(maps)]], axis=1)  # (C, 2 · side, side, 3)
    columns = min(_COLUMNS, len(pairs))
    missing = -len(pairs) % columns
    pairs = np.pad(pairs, ((0, missing), (0, _GAP), (0, _GAP), (0, 0)), constant_values=_PAPER)
    bands, (height, width) = len(pairs) // columns, pairs.shape[1:3]
    picture = pairs.reshape(bands, columns, height, width, 3).swapaxes(1, 2).reshape(bands * height, columns * width, 3)
    return np.ascontiguousarray(picture[:-_GAP, :-_GAP])


def panel_caption(classes: Sequence[str]) -> str:
    """What `class_panel` shows, in a line; class names may hold anything."""
    names = ["".join(char for char in " ".join(name.split()) if char.isprintable()) for name in classes[:_CLASSES]]
    more = f"; the first {_CLASSES} of {len(classes)} classes" if len(classes) > _CLASSES else ""
    return f"prototypes above class maps, by row: {', '.join(names)}{more}"


def _cells(maps: Tensor) -> NDArray[np.uint8]:
    """(C, h, w) in [0, 1] to about 64 pixels a side: whole multiples of a small map, some pixels of a large one."""
    values = np.nan_to_num(maps[:_CLASSES].float().cpu().numpy()).clip(0, 1)
    shades = np.rint(255 * values).astype(np.uint8)
    rows, columns = (_picked(length) for length in shades.shape[1:])
    return shades[:, rows[:, None], columns]


def _picked(length: int) -> NDArray[np.intp]:
    side = length * max(1, round(_SIDE / length)) if length <= _SIDE else _SIDE
    return np.arange(side) * length // side
