"""Folders of class folders, with or without train/, valid/ (or val/) and test/ above them."""

import os
from pathlib import Path

import torch

from distributed_batchcam.errors import InputError

from .image_files import is_image_name
from .images import FileImages, Parts


def read_folders(root: Path, size: int) -> Parts:
    """The parts of the image folder `root`, at `size`×`size`; classes are the sorted folder names.

    Two layouts: ROOT/class/…/image, or ROOT/{train,valid,test}/class/…/image, where val/ may stand for
    valid/, and a valid/ without a test/ is the test part. Hidden files and folders are passed over.

    Raises:
        InputError: fewer than two classes, a class without an image, parts with different classes.
    """
    parts = _visible_folders(root)
    held_out = [name for name in ("valid", "val", "test") if name in parts]
    if "train" not in parts or not held_out:
        classes, train = _read_part(root, size)
        return Parts(classes, train)
    if {"valid", "val"} <= set(parts):
        raise InputError(f"{root} has both valid/ and val/; keep one of them")
    classes, train = _read_part(root / "train", size)
    read = {}
    for name in held_out:
        found, read[name] = _read_part(root / name, size)
        if found != classes:
            raise InputError(f"{root / name} and {root / 'train'} differ in {_difference(found, classes)}")
    test = read.pop("test", None)
    valid = next(iter(read.values()), None)
    return Parts(classes, train, valid) if test is None else Parts(classes, train, test, valid)


def _read_part(folder: Path, size: int) -> tuple[tuple[str, ...], FileImages]:
    classes = _visible_folders(folder)
    if len(classes) < 2:
        found = f"only the folder {classes[0]!r}" if classes else "no folder"
        raise InputError(
            f"{folder} holds {found}: it needs a folder of images for each of two or more classes "
            f"(or train/ beside test/, each with such folders)"
        )
    paths: list[Path] = []
    counts = []
    for name in classes:
        images = images_below(folder / name)
        if not images:
            raise InputError(f"class folder {folder / name} holds no image; add some or remove it")
        paths += images
        counts.append(len(images))
    targets = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return tuple(classes), FileImages(folder, paths, targets, size)


def _visible_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def images_below(folder: Path) -> list[Path]:
    """All image files in a folder and those below it, sorted; hidden ones are passed over."""
    images = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images += [Path(parent, name) for name in sorted(files) if is_image_name(name)]
    return images


def _difference(found: tuple[str, ...], expected: tuple[str, ...]) -> str:
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    listed = [f"missing {', '.join(missing)}"] if missing else []
    listed += [f"extra {', '.join(extra)}"] if extra else []
    return f"their class folders: {'; '.join(listed)}"
