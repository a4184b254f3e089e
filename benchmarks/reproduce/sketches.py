"""Ten drawings for each data set, as somebody might scribble them: prototypes without any image of the data.

`python -m benchmarks.reproduce.sketches DIR` writes DIR/mnist/0.png … and DIR/fashion_mnist/Bag.png …, 28×28, bright
where a class may be. They are drawn by strokes and outlines at 280×280, blurred a little, and made smaller.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SIZE, SCALE = 28, 10
_STROKE = 3.2  # pixels of 28
_BLUR = 1.0  # standard deviation, pixels of 28

Points = list[tuple[float, float]]
Drawing = Callable[[ImageDraw.ImageDraw], None]


def _stroke(*points: tuple[float, float]) -> Drawing:
    """A line through points (x, y) in pixels of 28, with round ends."""

    def draw(canvas: ImageDraw.ImageDraw) -> None:
        line = [(x * SCALE, y * SCALE) for x, y in points]
        canvas.line(line, fill=255, width=round(_STROKE * SCALE), joint="curve")
        radius = _STROKE * SCALE / 2
        for x, y in (line[0], line[-1]):
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)

    return draw


def _ring(left: float, top: float, right: float, bottom: float) -> Drawing:
    """The outline of an ellipse within a box."""
    half = _STROKE / 2
    box = tuple(SCALE * edge for edge in (left - half, top - half, right + half, bottom + half))
    return lambda canvas: canvas.ellipse(box, outline=255, width=round(_STROKE * SCALE))


def _shape(*points: tuple[float, float]) -> Drawing:
    """A filled outline through points (x, y)."""
    return lambda canvas: canvas.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=255)


_TORSO = [(9.0, 3.0), (19.0, 3.0), (20.0, 25.0), (8.0, 25.0)]
_SHORT_SLEEVES = [_shape((9, 3), (3, 8), (6, 12), (10, 9)), _shape((19, 3), (25, 8), (22, 12), (18, 9))]
_LONG_SLEEVES = [_shape((9, 3), (3, 24), (7, 25), (11, 10)), _shape((19, 3), (25, 24), (21, 25), (17, 10))]
_SHOE = _shape((3, 17), (9, 14), (14, 9), (20, 13), (25, 12), (25, 20), (3, 20))

SKETCHES: dict[str, dict[str, list[Drawing]]] = {
    "mnist": {
        "0": [_ring(8, 6, 20, 22)],
        "1": [_stroke((16, 5), (13, 23)), _stroke((14, 5), (14, 23))],
        "2": [_stroke((8, 9), (13, 6), (19, 9), (18, 14), (8, 22), (20, 22))],
        "3": [_stroke((9, 6), (17, 6), (19, 10), (13, 14), (19, 18), (16, 22), (9, 22))],
        "4": [_stroke((9, 7), (8, 14), (20, 14)), _stroke((19, 6), (17, 23))],
        "5": [_stroke((19, 6), (10, 6), (9, 13), (17, 14), (19, 18), (15, 22), (8, 21))],
        "6": [_stroke((16, 5), (10, 12), (9, 18)), _ring(9, 14, 18, 22)],
        "7": [_stroke((8, 8), (20, 8), (15, 15), (13, 23))],
        "8": [_ring(10, 5, 18, 13), _ring(9, 14, 18, 22)],
        "9": [_ring(9, 7, 18, 14), _stroke((18, 10), (17, 16), (15, 23))],
    },
    "fashion_mnist": {
        "T-shirt_top": [_shape(*_TORSO), *_SHORT_SLEEVES],
        "Trouser": [_shape((9, 2), (19, 2), (20, 26), (15, 26), (14, 9), (13, 26), (8, 26))],
        "Pullover": [_shape(*_TORSO), *_LONG_SLEEVES],
        "Dress": [_shape((11, 2), (17, 2), (17, 10), (20, 26), (8, 26), (11, 10))],
        "Coat": [_shape((8, 2), (20, 2), (21, 26), (7, 26)), *_LONG_SLEEVES],
        "Sandal": [_shape((2, 18), (10, 14), (16, 9), (25, 12), (26, 19), (2, 21))],
        "Shirt": [_shape((8, 2), (20, 2), (20, 26), (8, 26)), *_LONG_SLEEVES, *_SHORT_SLEEVES],
        "Sneaker": [_SHOE],
        "Bag": [_shape((4, 11), (24, 11), (25, 25), (3, 25)), _ring(9, 4, 19, 16)],
        "Ankle_boot": [_shape((13, 5), (23, 5), (25, 22), (3, 22), (3, 17), (12, 14))],
    },
}


def draw(drawings: list[Drawing]) -> Image.Image:
    """One sketch, 28×28, grey."""
    canvas = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    for drawing in drawings:
        drawing(ImageDraw.Draw(canvas))
    return canvas.filter(ImageFilter.GaussianBlur(_BLUR * SCALE)).resize((SIZE, SIZE), Image.Resampling.BOX)


def write_sketches(folder: Path, suffix: str = "") -> None:
    """All sketches as FOLDER/DATASETSUFFIX/CLASS.png."""
    for dataset, sketches in SKETCHES.items():
        target = folder / f"{dataset}{suffix}"
        target.mkdir(parents=True, exist_ok=True)
        for name, drawings in sketches.items():
            draw(drawings).save(target / f"{name}.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.reproduce.sketches DIR")
    write_sketches(Path(sys.argv[1]))
