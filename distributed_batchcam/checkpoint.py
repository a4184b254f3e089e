"""Checkpoints and models on disk: written atomically, verified when read, tensors as safetensors, the rest as JSON.

Nothing here is pickled: reading a file from somebody else cannot run code.
"""

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor

from .config import RunConfig, make_config
from .data import normalize_images
from .errors import InputError
from .models import CAMModel, create_model, load_weights

TENSORS, STATE, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"
_MAX_CLASSES, _MAX_SIZE = 100_000, 4096  # of a model that is read
_MAX_STATE_BYTES = 1 << 28  # of state.json, which is parsed whole
_TENSOR = "$tensor"  # {"$tensor": name} in the JSON stands for that tensor of the safetensors file


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it holds either its old content or all of the new, whatever happens."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@dataclass(frozen=True)
class Packed:
    """A state ready to be written: it shares no memory with the training that goes on."""

    tree: Any  # JSON, with references to tensors
    tensors: dict[str, Tensor]  # on the CPU


def pack(state: dict[str, Any]) -> Packed:
    """Copy a nested state: tensors, numbers, strings, lists, dictionaries.

    Raises:
        TypeError: it holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    return Packed(_take_tensors(state, "", tensors), tensors)


def write_checkpoint(folder: Path, name: str, packed: Packed) -> Path:
    """Write a packed state as `folder/name`: all of it is there under that name, or nothing.

    Raises:
        OSError: it cannot be written; nothing under other names has changed.
    """
    final, aside, old = folder / name, folder / f".{name}.tmp", folder / f".{name}.old"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        contents = {
            TENSORS: save(packed.tensors),
            STATE: json.dumps(packed.tree, indent=1).encode(),
        }
        contents[SUMS] = _sums(contents)
        for file, content in contents.items():
            write_atomic(aside / file, content)
        # A folder cannot be renamed over another. What stands in the way is the same step of the same run; it is
        # moved, and deleted only once the new one is in its place.
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        aside.rename(final)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    sync_folder(folder)
    shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The nested state of a checkpoint.

    Raises:
        InputError: anything missing, cut off or altered, by a single bit in any of its files.
    """
    try:
        if (path / STATE).stat().st_size > _MAX_STATE_BYTES:
            raise InputError(f"checkpoint {path}: {STATE} is larger than any that batchcam writes")
        contents = {name: (path / name).read_bytes() for name in (TENSORS, STATE)}
        _verify(path, contents)
        state = _put_tensors(json.loads(contents[STATE]), load(contents[TENSORS]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or _in_a_line(error)
        raise InputError(f"checkpoint {path} cannot be read: {reason}") from error
    if not isinstance(state, dict):
        raise InputError(f"checkpoint {path}: {STATE} holds no state")
    return state


def _sums(contents: dict[str, bytes]) -> bytes:
    """What `sha256sum` prints of the files: `sha256sum -c SHA256SUMS` checks a checkpoint by hand."""
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items()).encode()


def _verify(path: Path, contents: dict[str, bytes]) -> None:
    noted = (path / SUMS).read_bytes()
    if noted == _sums(contents):
        return
    lines = noted.splitlines()
    for name, content in contents.items():
        if _sums({name: content}).rstrip() not in lines:
            raise InputError(f"checkpoint {path}: {name} is damaged (its checksum differs)")
    raise InputError(f"checkpoint {path}: {SUMS} is damaged")


def save_model(path: Path, model: torch.nn.Module, metadata: dict[str, Any]) -> None:
    """Save weights, with what is needed beside config.yaml to build the model again in the file's header."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomic(path, save(tensors, {key: json.dumps(value) for key, value in metadata.items()}))


def save_prototypes(path: Path, prototypes: dict[str, Tensor]) -> None:
    """Save the prototypes (C, h, w) of each split."""
    write_atomic(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in prototypes.items()}))


@dataclass(frozen=True)
class Run:
    """A trained model, read back from its run directory."""

    path: Path  # the run directory
    name: str  # what of it was read: "" for the final model, otherwise the checkpoint's name
    config: RunConfig
    model: CAMModel
    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prototypes: dict[str, Tensor]

    def normalize(self, images: Tensor) -> Tensor:
        """(x - mean) / std per channel, as in training, for images (N, ch, h, w) in [0, 1]."""
        return normalize_images(images, self.mean, self.std)


def load_run(path: Path, target_layer: str | None = None) -> Run:
    """Model, configuration and prototypes of a run.

    Args:
        path: a run directory or its model.safetensors (the final model), or one of its checkpoints.
        target_layer: explain this layer instead of the run's own.

    Raises:
        InputError: not a run, an unfinished run, or files that do not fit together.
    """
    if path.name == "model.safetensors" and path.is_file():
        path = path.parent
    is_checkpoint = (path / STATE).is_file()
    run_dir = path.parent.parent if is_checkpoint else path
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"{path} is not a run directory: it has no config.yaml")
    weights, metadata = _checkpoint_weights(path) if is_checkpoint else _final_weights(path)
    if wrong := [key for key, tensor in weights.items() if not bool(tensor.isfinite().all())]:
        raise InputError(f"{path}: {wrong[0]} holds weights that are not finite: the training diverged, lower its --lr")
    config = make_config({}, run_dir / "config.yaml")
    try:
        classes, channels, size, mean, std = _checked_metadata(metadata)
        prototypes = load_file(run_dir / "prototypes.safetensors")
        fits = prototypes["valid"].shape == (len(classes), size, size)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{path}: the model cannot be read: {_in_a_line(error)}") from error
    if not fits:
        raise InputError(f"{run_dir / 'prototypes.safetensors'} is of other classes or another size than the model")
    layer = config.target_layer if target_layer is None else target_layer
    model = create_model(config.model, len(classes), channels, size, pretrained=False, target_layer=layer)
    load_weights(model, weights, str(path))
    name = path.name if is_checkpoint else ""
    return Run(run_dir, name, config, model.eval(), classes, channels, size, mean, std, prototypes)


def _final_weights(run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and metadata of a finished run."""
    file = run_dir / "model.safetensors"
    if not file.is_file():
        newest = max((run_dir / "checkpoints").glob("epoch_*"), default=None)
        hint = f"; its newest checkpoint is {newest}" if newest else ""
        raise InputError(
            f"{run_dir} holds an unfinished run: no model.safetensors (batchcam train --resume auto ends it{hint})"
        )
    try:
        with safe_open(file, "pt") as opened:
            metadata = {key: json.loads(value) for key, value in (opened.metadata() or {}).items()}
            return {key: opened.get_tensor(key) for key in opened.keys()}, metadata  # noqa: SIM118
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"{file}: the model cannot be read: {_in_a_line(error)}") from error


def _checked_metadata(
    metadata: dict[str, Any],
) -> tuple[tuple[str, ...], int, int, tuple[float, ...], tuple[float, ...]]:
    """Classes, channels, image size, mean and std; a file from others must not ask for a model of any size.

    Raises:
        ValueError, KeyError, TypeError: they are missing, of another type, or out of range.
    """
    classes, channels, size = metadata["classes"], metadata["channels"], metadata["image_size"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise TypeError("its classes are no list of names")
    if not 2 <= len(classes) <= _MAX_CLASSES:
        raise ValueError(f"it names {len(classes):,} classes; from 2 to {_MAX_CLASSES:,} are possible")
    if type(channels) is not int or type(size) is not int or channels not in (1, 3) or not 1 <= size <= _MAX_SIZE:
        raise ValueError(f"its images of {channels!r:.20}×{size!r:.20}×{size!r:.20} are not possible")
    mean, std = (tuple(float(value) for value in metadata[name]) for name in ("mean", "std"))
    if len(mean) != channels or len(std) != channels or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError("its mean and std are not those of images")
    return tuple(classes), channels, size, mean, std


def _in_a_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]


def _checkpoint_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights (the moving average, where there is one) and metadata of a checkpoint."""
    state = load_checkpoint(path)
    if "metadata" not in state:
        raise InputError(f"checkpoint {path} is of an older version, which did not note its classes")
    return state["model"] if state["ema"] is None else state["ema"], state["metadata"]


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with every tensor moved into `tensors` and a reference left behind."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {str(key): _take_tensors(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take_tensors(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a checkpoint cannot hold {name}, a {type(value).__name__}")


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        # JSON turned the integer keys of optimizer states into strings.
        return {int(key) if key.isdigit() else key: _put_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value


def sync_folder(folder: Path) -> None:
    """Make renames within a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
