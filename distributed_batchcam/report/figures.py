"""Figures as PNG files."""

import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from distributed_batchcam.checkpoint import write_atomic
from distributed_batchcam.distances import ssim

_COLUMNS = 10


def save_class_maps(path: Path, prototypes: Tensor, maps: Tensor, classes: Sequence[str], title: str) -> None:
    """Prototypes above the class maps, a column per class, with their SSIM.

    Args:
        path: PNG file.
        prototypes: (C, h, w) in [0, 1].
        maps: (C, h, w) in [0, 1].
        classes: C names.
        title: one line.
    """
    similarities = ssim(maps, prototypes).tolist()
    columns = min(_COLUMNS, len(classes))
    bands = -(-len(classes) // columns)
    # A Figure of its own needs no display and leaves no global state behind, unlike pyplot.
    figure = Figure(figsize=(1.15 * columns + 0.8, 2.75 * bands + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, name in enumerate(classes):
        band, column = divmod(index, columns)
        above, below = axes[2 * band, column], axes[2 * band + 1, column]
        above.imshow(prototypes[index].numpy(), cmap="gray", vmin=0, vmax=1)
        # Names are text, not matplotlib's mathematics: a "$" in a folder name is just that.
        above.set_title(_shortened(name), fontsize=8, parse_math=False)
        below.imshow(maps[index].numpy(), cmap="inferno", vmin=0, vmax=1)
        below.set_title(f"{similarities[index]:.2f}", fontsize=8)
    for band in range(bands):
        for row, label in ((2 * band, "prototype"), (2 * band + 1, "class map\n(SSIM)")):
            axes[row, 0].text(
                -0.12, 0.5, label, transform=axes[row, 0].transAxes, rotation=90, ha="right", va="center", fontsize=8
            )
    buffer = BytesIO()
    with warnings.catch_warnings():
        # A class name may be in a script that matplotlib's font lacks: it is drawn as boxes then.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())


def _shortened(name: str, limit: int = 14) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
