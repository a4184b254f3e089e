"""Explanations on disk: a picture per image or sheets of them, and JSON and npz for programs."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .errors import InputError
from .evaluation import Evaluation
from .explanations import Explanations
from .report.figures import save_class_maps
from .report.overlays import panel, sheets

_NAME_BYTES = 200  # file systems take 255 for the whole of a file name
_COMPRESSION = 1  # of PNG: a third of the time of Pillow's own for a fifth more bytes


def save_explanations(explanations: Explanations, folder: str | Path, *, sheet: bool = False) -> list[Path]:
    """Write pictures, explanations.json and explanations.npz into a new folder; all of them or none.

    The npz holds `predicted_maps` and `target_maps` (N, H, W) in [0, 1] at the target layer's size (resize them to the
    image bilinearly), `probabilities`, `l1` and `ssim` (N, C), `predicted` and `targets` (N,).

    Args:
        explanations: what to write.
        folder: must not exist, or be empty.
        sheet: small pictures on sheets instead of a picture per image.

    Returns:
        The pictures.

    Raises:
        InputError: a folder that holds something, or cannot be made.
    """
    folder = Path(folder)
    names = _file_names(explanations.names)
    with NewFolder(folder) as aside:
        if sheet:
            pictures = [f"sheet-{number}.png" for number in range(1, 1 + _save_sheets(explanations, aside))]
        else:
            pictures = [f"{name}.png" for name in names]
            save_pictures(lambda index: panel(explanations, index), [aside / picture for picture in pictures])
        entries = describe(explanations)
        if not sheet:
            for entry, picture in zip(entries, pictures, strict=True):
                entry["picture"] = picture
        (aside / "explanations.json").write_text(json.dumps(entries, indent=1) + "\n", "utf-8")
        np.savez(aside / "explanations.npz", **_arrays(explanations))  # type: ignore[arg-type]
    return [folder / picture for picture in pictures]


def save_class_explanations(evaluation: Evaluation, classes: Sequence[str], folder: str | Path, title: str) -> Path:
    """Write class_maps.png, class_maps.json and class_maps.npz into a new folder; all of them or none.

    The npz holds `prototypes`, `all`, `right` and `wrong`, each (C, h, w) in [0, 1].

    Args:
        evaluation: of the image set, see `explain_classes`.
        classes: C names.
        folder: must not exist, or be empty.
        title: of the picture.

    Returns:
        The picture.

    Raises:
        InputError: a folder that holds something, or cannot be made.
    """
    folder, rows = Path(folder), evaluation.class_rows()
    similarities = {label: evaluation.similarities(*row).tolist() for label, row in rows.items()}
    entries = [
        {
            "class": name,
            **{
                label: {"images": int(counts[index]), "ssim": similarities[label][index] if counts[index] else None}
                for label, (_, counts) in rows.items()
            },
        }
        for index, name in enumerate(classes)
    ]
    with NewFolder(folder) as aside:
        save_class_maps(aside / "class_maps.png", evaluation.prototypes, rows, classes, title)
        (aside / "class_maps.json").write_text(json.dumps(entries, indent=1) + "\n", "utf-8")
        maps = {label: maps.numpy() for label, (maps, _) in rows.items()}
        np.savez(aside / "class_maps.npz", prototypes=evaluation.prototypes.numpy(), **maps)  # type: ignore[arg-type]
    return folder / "class_maps.png"


def free_folder(run_dir: Path) -> Path:
    """The next folder for explanations in a run directory: explanations-1, explanations-2, …"""
    return next(path for n in count(1) if not (path := run_dir / f"explanations-{n}").exists())


def require_new(folder: Path) -> None:
    """Require that a folder does not exist yet, or is empty.

    Raises:
        InputError: it holds something, or is a file.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists already: name a new folder")


def describe(explanations: Explanations) -> list[dict[str, Any]]:
    """Each explanation in words and numbers, ready for JSON."""
    classes = explanations.classes
    entries = []
    for index, name in enumerate(explanations.names):
        source = explanations.sources[index]
        target = None if explanations.targets is None else int(explanations.targets[index])
        l1, ssim = explanations.l1[index].tolist(), explanations.ssim[index].tolist()
        entries.append(
            {
                "name": name,
                "file": None if source is None else str(source),
                "predicted": classes[int(explanations.predicted[index])],
                "confidence": float(explanations.confidence[index]),
                "target": None if target is None else classes[target],
                "target_probability": None if target is None else float(explanations.probabilities[index, target]),
                "constant_map": bool(explanations.constant[index]),
                # Of the predicted class's map; the nearest class's prototype first.
                "prototypes": {
                    classes[place]: {"l1": l1[place], "ssim": ssim[place]}
                    for place in sorted(range(len(classes)), key=l1.__getitem__)
                },
            }
        )
    return entries


def _arrays(explanations: Explanations) -> dict[str, np.ndarray]:
    tensors = {
        "predicted_maps": explanations.predicted_maps,
        "target_maps": explanations.target_maps,
        "probabilities": explanations.probabilities,
        "l1": explanations.l1,
        "ssim": explanations.ssim,
        "predicted": explanations.predicted,
        "targets": explanations.targets,
    }
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


def save_pictures(draw: Callable[[int], Image.Image], paths: Sequence[Path]) -> None:
    """Write picture `draw(i)` as PNG to `paths[i]`, for all i, several at a time."""

    def save(index: int) -> None:
        draw(index).save(paths[index], "png", compress_level=_COMPRESSION)

    # Pillow lets go of the interpreter lock while it scales and compresses.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = tqdm(pool.map(save, range(len(paths))), total=len(paths), unit=" images", disable=None, leave=False)
        try:
            for _ in progress:
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or all the rest would still be drawn
            raise


def _save_sheets(explanations: Explanations, folder: Path) -> int:
    pages = sheets(explanations)
    for number, page in enumerate(pages, 1):
        page.save(folder / f"sheet-{number}.png")
    return len(pages)


def _file_names(names: Sequence[str]) -> list[str]:
    """Names that are safe as file names, and all different."""
    letters = ["".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name) for name in names]
    safe = [name.encode()[:_NAME_BYTES].decode(errors="ignore") for name in letters]
    if len({name.lower() for name in safe}) == len(safe):
        return safe
    width = len(str(len(safe)))
    return [f"{number:0{width}}-{name}" for number, name in enumerate(safe, 1)]


class NewFolder:
    """A folder that appears whole at the end, or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path = path.absolute()
        self.aside = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> Path:
        require_new(self.path)
        try:
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{self.path} cannot be made: {error.strerror}") from error
        return self.aside

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            shutil.rmtree(self.aside, ignore_errors=True)
            if isinstance(error, OSError):
                raise InputError(f"{self.path} cannot be written: {error.strerror or error}") from error
            return
        if self.path.exists():
            self.path.rmdir()
        self.aside.rename(self.path)
