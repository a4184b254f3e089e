"""Prototypes as files: one image or mask per class, which the user supplies, or draws on."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from distributed_batchcam.errors import InputError

from .image_files import is_image_name, read_rgb


def load_prototypes(folder: str | Path, classes: Sequence[str], image_size: int) -> Tensor:
    """Prototypes from a folder with one image file per class, bright where a class's CAM should be.

    A file is named by its class, with any extension of an image: `7.png`. In names, every character other
    than A-Z, a-z, 0-9, `_`, `.` and `-` counts as `_`, and upper case as lower: the class `T-shirt/top` is
    `T-shirt_top.png`. Colours are averaged to grey, and the central square is resized (bilinear, antialias).

    Args:
        folder: the folder; hidden files, folders and files that are not images are passed over.
        classes: names of the C classes, in the order of the targets.
        image_size: side s of the prototypes.

    Returns:
        (C, s, s) float32 in [0, 1]; not min-max scaled.

    Raises:
        InputError: a missing folder; a class without a file or with several; a file of no class; a file that
            cannot be read, or of one value throughout (which asks for nothing).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; name the one with a prototype image per class")
    paths = paths_by_class(folder, classes, "prototype")
    return torch.stack([_read_prototype(paths[name], image_size) for name in classes])


def save_prototype_images(folder: str | Path, prototypes: Tensor, classes: Sequence[str]) -> None:
    """Write prototypes (C, h, w) in [0, 1] as grey PNG files that `load_prototypes` reads.

    Args:
        folder: an empty one.
        prototypes: in the order of `classes`.
        classes: names of the C classes.

    Raises:
        InputError: classes that share a name.
    """
    _require_different(classes, "prototype")
    for name, prototype in zip(classes, prototypes.mul(255).round().to(torch.uint8).cpu(), strict=True):
        Image.fromarray(prototype.numpy()).save(Path(folder) / f"{re.sub(_REPLACED, '_', name)}.png")


def paths_by_class(folder: Path, classes: Sequence[str], kind: str) -> dict[str, Path]:
    """The one file of each class in a folder, by name as `load_prototypes` says; `kind` is for messages.

    Raises:
        InputError: a class without a file or with several; a file of no class; classes that share a name.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if is_image_name(path.name) and path.is_file():
            files.setdefault(_key(path.stem), []).append(path)
    _require_different(classes, kind)
    names = {_key(name): name for name in classes}
    if missing := [name for key, name in names.items() if key not in files]:
        wanted = re.sub(_REPLACED, "_", missing[0])
        raise InputError(f"{folder} holds no {kind} of class {', '.join(missing)}; the first would be {wanted}.png")
    if extra := [path.name for key, group in files.items() if key not in names for path in group]:
        raise InputError(f"{folder} holds {', '.join(extra)}, of no class; remove or rename it")
    if several := [path.name for group in files.values() if len(group) > 1 for path in group]:
        raise InputError(f"{folder} holds several {kind}s of one class: {', '.join(several)}; keep one")
    return {name: files[_key(name)][0] for name in classes}


_REPLACED = r"[^A-Za-z0-9_.-]"


def _key(name: str) -> str:
    return re.sub(_REPLACED, "_", name).lower()


def _require_different(classes: Sequence[str], kind: str) -> None:
    names: dict[str, list[str]] = {}
    for name in classes:
        names.setdefault(_key(name), []).append(name)
    if alike := [repr(name) for group in names.values() if len(group) > 1 for name in group]:
        raise InputError(f"classes {', '.join(alike)} would share a {kind} file; rename one")


def _read_prototype(path: Path, size: int) -> Tensor:
    gray = torch.from_numpy(np.array(read_rgb(path))).float().mean(2)
    side = min(gray.shape)
    top, left = (gray.shape[0] - side) // 2, (gray.shape[1] - side) // 2
    square = gray[None, None, top : top + side, left : left + side]
    scaled = F.interpolate(square, size=(size, size), mode="bilinear", antialias=True)[0, 0].div(255)
    if float(scaled.max() - scaled.min()) < 0.5 / 255:
        raise InputError(f"prototype {path} is of one value throughout and asks for nothing; draw one")
    return scaled.clamp(0, 1)
