"""Figures as PNG files."""

import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from distributed_batchcam.checkpoint import write_atomic
from distributed_batchcam.distances import ssim

from .wording import similarity_text

_COLUMNS = 10
MOST_CLASSES = 50  # that a picture has room for; matplotlib takes a second for every ten


def save_class_maps(
    path: Path,
    prototypes: Tensor,
    maps: Mapping[str, tuple[Tensor, Tensor]],
    classes: Sequence[str],
    title: str,
) -> None:
    """Prototypes above rows of class maps, a column per class, each map with its SSIM and number of images.

    Of more than `MOST_CLASSES` classes, the first are drawn, and the title says so.

    Args:
        path: PNG file.
        prototypes: (C, h, w) in [0, 1].
        maps: by row label, maps (C, h, w) in [0, 1] and the numbers of images (C,) that they are made of.
        classes: C names.
        title: one line.
    """
    if len(classes) > MOST_CLASSES:
        title = f"{title}; the first {MOST_CLASSES} of {len(classes):,} classes"
        classes, prototypes = classes[:MOST_CLASSES], prototypes[:MOST_CLASSES]
        maps = {label: (row[:MOST_CLASSES], counts) for label, (row, counts) in maps.items()}
    columns = min(_COLUMNS, len(classes))
    bands, height = -(-len(classes) // columns), 1 + len(maps)
    # A Figure of its own needs no display and leaves no global state behind, unlike pyplot.
    figure = Figure(figsize=(1.15 * columns + 0.9, (1.38 * height) * bands + 0.6), layout="constrained")
    # Names are text, not matplotlib's mathematics: a "$" in a folder name is just that.
    figure.suptitle(title, fontsize=10, parse_math=False)
    axes = figure.subplots(height * bands, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    similarities = {label: ssim(row, prototypes).tolist() for label, (row, _) in maps.items()}
    for index, name in enumerate(classes):
        band, column = divmod(index, columns)
        cells = axes[height * band : height * (band + 1), column]
        cells[0].imshow(prototypes[index].numpy(), cmap="gray", vmin=0, vmax=1)
        cells[0].set_title(_shortened(name), fontsize=8, parse_math=False)
        for cell, (label, (row, counts)) in zip(cells[1:], maps.items(), strict=True):
            if int(counts[index]) == 0:
                cell.set_title("no image", fontsize=7, color="gray")
                cell.imshow(torch.ones_like(prototypes[index]).numpy(), cmap="gray", vmin=0, vmax=1)
                continue
            cell.imshow(row[index].numpy(), cmap="inferno", vmin=0, vmax=1)
            cell.set_title(f"{similarity_text(similarities[label][index])} · {int(counts[index]):,}", fontsize=7)
    for band in range(bands):
        for row_number, label in enumerate(["prototype", *maps]):
            axis = axes[height * band + row_number, 0]
            axis.text(-0.12, 0.5, label, transform=axis.transAxes, rotation=90, ha="right", va="center", fontsize=8)
    figure.supxlabel("class maps with their SSIM to the prototype · number of images", fontsize=7, color="gray")
    buffer = BytesIO()
    with warnings.catch_warnings():
        # A class name may be in a script that matplotlib's font lacks: it is drawn as boxes then.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())


def _shortened(name: str, limit: int = 14) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
