"""Explain what a trained model sees: in files, in images of its data set, or in each class as a whole."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Run, load_run
from .data import ImageSet, Loader
from .data.image_files import read_square
from .data.images import FileImages, TensorImages
from .errors import InputError, unknown_name
from .evaluate_run import Split, load_run_data
from .evaluation import Evaluation, evaluate
from .explainer import Explainer
from .explanations import Explanations, explain_images
from .runtime import choose_device
from .trainer import EVALUATION_BATCH

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow turns colours into grey


def explain(
    run: str | Path | Run,
    images: str | Path | Sequence[str | Path] | Tensor | None = None,
    *,
    split: Split = "test",
    indices: Sequence[int | slice] | None = None,
    target: str | None = None,
    dataset: str | None = None,
    data_root: str | Path | None = None,
    layer: str | None = None,
    device: str = "auto",
) -> Explanations:
    """Explain single images by a trained model: predictions, and Grad-CAMs of the predicted and the target class.

    Args:
        run: a run directory, one of its checkpoints, or what `load_run` returned.
        images: image files (or one), or a tensor (N, ch, s, s) in [0, 1] at the model's size; None: of the data set.
        split: which part of the data set.
        indices: positions and slices in it; None: all.
        target: class name of the files' or the tensor's images, if it is known.
        dataset: another data set than the run's own, with the same classes.
        data_root: its folder.
        layer: explain this layer instead of the run's own.
        device: `cpu`, `cuda`, or `auto`.

    Returns:
        Explanations, all tensors on the CPU.

    Raises:
        InputError: not a run, an image that cannot be read, a position outside the data set, an unknown class.
    """
    run, chosen = _loaded(run, layer), choose_device(device)
    targets: Tensor | None
    names: Sequence[str] | None = None
    sources: Sequence[Path | None] | None = None
    if images is None:
        if target is not None:
            raise InputError("a target class is for files: images of a data set have their own")
        data = load_run_data(run, dataset, None if data_root is None else Path(data_root))
        pixels, targets, names, sources = _of_dataset(getattr(data, split), split, indices)
    else:
        if indices is not None:
            raise InputError("positions in the data set and images of your own exclude each other: name one of them")
        if isinstance(images, Tensor):
            pixels = _checked(images, run)
        else:
            paths = [Path(path) for path in ([images] if isinstance(images, str | Path) else images)]
            if not paths:
                raise InputError("no image is named: give files, or positions in the data set")
            sources, names = paths, [os.fsencode(path.stem).decode("utf-8", "replace") for path in paths]
            pixels = torch.stack([_read(path, run) for path in paths])
        targets = None if target is None else torch.full((len(pixels),), _class_number(target, run))
    explainer = Explainer(run.model.to(chosen), run.normalize)
    prototypes = run.prototypes["valid"].to(chosen)
    return explain_images(explainer, pixels, targets, prototypes, run.classes, names=names, sources=sources)


def explain_classes(
    run: str | Path | Run,
    *,
    split: Split = "test",
    dataset: str | None = None,
    data_root: str | Path | None = None,
    layer: str | None = None,
    device: str = "auto",
) -> Evaluation:
    """Class-level maps ("reconstructions") of a whole image set: of all images, the right and the wrong ones.

    M̄_c of the Batch-CAM paper (eq. 3-5), per class of the target, as in its figures 2 to 7.

    Args and Raises: as for `explain`.

    Returns:
        An evaluation with `class_maps`, `right_maps` and `wrong_maps` (C, h, w), and `prototypes`.
    """
    run, chosen = _loaded(run, layer), choose_device(device)
    data = load_run_data(run, dataset, None if data_root is None else Path(data_root))
    loader = Loader(getattr(data, split), EVALUATION_BATCH, chosen, workers=run.config.workers)
    explainer = Explainer(run.model.to(chosen), run.normalize)
    return evaluate(explainer, loader, run.prototypes["valid"].to(chosen), progress=True)


def _loaded(run: str | Path | Run, layer: str | None) -> Run:
    if isinstance(run, Run):
        if layer is not None:
            raise InputError("another layer needs the run's path: load_run takes it, too")
        return run
    return load_run(Path(run), layer)


def _of_dataset(
    images: ImageSet, split: str, indices: Sequence[int | slice] | None
) -> tuple[Tensor, Tensor, list[str], list[Path | None]]:
    """Images, targets, names and files of positions in an image set."""
    positions = _positions([slice(None)] if indices is None else indices, len(images), split)
    chosen = images.subset(torch.tensor(positions))
    files = chosen.files if isinstance(chosen, TensorImages) else chosen
    sources: list[Path | None] = [*files.paths] if isinstance(files, FileImages) else [None] * len(positions)
    if isinstance(chosen, TensorImages):
        pixels = chosen.images
    else:
        pixels = torch.stack([chosen[place] for place in range(len(chosen))])
    width = len(str(len(images) - 1))
    return pixels / 255, chosen.targets, [f"{split}-{position:0{width}}" for position in positions], sources


def _positions(indices: Sequence[int | slice], length: int, split: str) -> list[int]:
    found: list[int] = []
    for index in indices:
        try:
            some = range(length)[index] if isinstance(index, slice) else [range(length)[index]]
        except IndexError:
            raise InputError(f"there is no image {index}: the {split} set has {length:,}") from None
        except (TypeError, ValueError):
            raise InputError(f"{index} is neither a position nor a slice") from None
        if not some:
            raise InputError(f"there is no image in {index}: the {split} set has {length:,}")
        found += some
    return found


def _read(path: Path, run: Run) -> Tensor:
    """An image file as the model takes it: (ch, s, s) in [0, 1]."""
    image = read_square(path, run.image_size) / 255
    if run.channels == 1:
        image = (image * torch.tensor(_LUMA)[:, None, None]).sum(0, keepdim=True)
    elif run.channels != 3:
        raise InputError(f"the model takes images of {run.channels} channels: files have 1 or 3")
    return image


def _checked(images: Tensor, run: Run) -> Tensor:
    shape = (run.channels, run.image_size, run.image_size)
    if images.ndim != 4 or images.shape[1:] != shape or not images.is_floating_point():
        raise InputError(
            f"images must be floating point of shape (N, {', '.join(map(str, shape))}), got {tuple(images.shape)}"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError("images must lie in [0, 1]: take them before normalisation")
    return images


def _class_number(name: str, run: Run) -> int:
    if name not in run.classes:
        raise unknown_name("class", name, run.classes)
    return run.classes.index(name)
