"""Checkpoints and models on disk: written atomically, verified when read, tensors as safetensors, the rest as JSON.

Nothing here is pickled: reading a file from somebody else cannot run code.
"""

import hashlib
import json
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
from .errors import InputError
from .models import CAMModel, create_model, load_weights

TENSORS, STATE = "tensors.safetensors", "state.json"
_TENSOR = "$tensor"  # {"$tensor": name} in the JSON stands for that tensor of the safetensors file


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it holds either its old content or all of the new, whatever happens."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync_folder(path.parent)


def save_checkpoint(folder: Path, name: str, state: dict[str, Any]) -> Path:
    """Save a nested state (tensors, numbers, strings, lists, dictionaries) as `folder/name`, atomically."""
    final, aside = folder / name, folder / f".{name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    tree = _take_tensors(state, "", tensors)
    packed = save(tensors)
    write_atomic(aside / TENSORS, packed)
    document = {"sha256": hashlib.sha256(packed).hexdigest(), "state": tree}
    write_atomic(aside / STATE, json.dumps(document, indent=1).encode())
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    _sync_folder(folder)
    return final


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The nested state of a checkpoint.

    Raises:
        InputError: anything missing, cut off or altered.
    """
    try:
        document = json.loads((path / STATE).read_bytes())
        packed = (path / TENSORS).read_bytes()
        if hashlib.sha256(packed).hexdigest() != document["sha256"]:
            raise InputError(f"checkpoint {path}: {TENSORS} is damaged (its checksum differs)")
        tensors = load(packed)
        state = _put_tensors(document["state"], tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"checkpoint {path} cannot be read: {error}") from error
    assert isinstance(state, dict)
    return state


def save_model(path: Path, model: torch.nn.Module, metadata: dict[str, Any]) -> None:
    """Save weights, with what is needed beside config.yaml to build the model again in the file's header."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomic(path, save(tensors, {key: json.dumps(value) for key, value in metadata.items()}))


def save_prototypes(path: Path, prototypes: dict[str, Tensor]) -> None:
    """Save the prototypes (C, h, w) of each split."""
    write_atomic(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in prototypes.items()}))


@dataclass(frozen=True)
class Run:
    """A finished run, read back from its directory."""

    path: Path
    config: RunConfig
    model: CAMModel
    classes: tuple[str, ...]
    image_size: int
    prototypes: dict[str, Tensor]


def load_run(path: Path) -> Run:
    """Model, configuration and prototypes of a run directory.

    Raises:
        InputError: not a run directory, an unfinished run, or files that do not fit together.
    """
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path} is not a run directory: it has no config.yaml")
    if not (path / "model.safetensors").is_file():
        raise InputError(f"{path} holds an unfinished run: no model.safetensors (batchcam train --resume auto ends it)")
    config = make_config({}, path / "config.yaml")
    try:
        with safe_open(path / "model.safetensors", "pt") as file:
            header = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        classes, image_size, channels = header["classes"], header["image_size"], header["channels"]
        prototypes = load_file(path / "prototypes.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{path}: the model cannot be read: {error}") from error
    model = create_model(
        config.model, len(classes), channels, image_size, pretrained=False, target_layer=config.target_layer
    )
    load_weights(model, weights, str(path / "model.safetensors"))
    return Run(path, config, model.eval(), tuple(classes), image_size, prototypes)


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with every tensor moved into `tensors` and a reference left behind."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
