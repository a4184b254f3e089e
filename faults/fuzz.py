"""Strange input by the thousand: each is read, or refused in one line; nothing hangs, nothing eats the memory."""

import gzip
import io
import json
import resource
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

from distributed_batchcam.checkpoint import (
    STATE,
    SUMS,
    TENSORS,
    _sums,
    load_checkpoint,
    load_run,
    pack,
    write_checkpoint,
)
from distributed_batchcam.config import RunConfig, make_config
from distributed_batchcam.data.folders import read_folders
from distributed_batchcam.data.idx import read_idx
from distributed_batchcam.data.image_files import read_square
from distributed_batchcam.errors import InputError

from .runs import Figures

SECONDS = 10  # for one input
MEMORY = 4 << 30  # for all of them, above what the process has to begin with


def everything(folder: Path, each: int) -> list[Figures]:
    """`each` inputs of every kind."""
    with _bounded_memory():
        return [_fuzz(name, strategy, read, each, folder) for name, (strategy, read) in _kinds().items()]


def _fuzz(
    name: str, strategy: st.SearchStrategy[Any], read: Callable[[Any, Path], object], count: int, folder: Path
) -> Figures:
    figures, slowest = Figures(f"strange {name}"), 0.0

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def one(value: Any) -> None:
        nonlocal slowest
        place = Path(tempfile.mkdtemp(dir=folder))
        since = time.monotonic()
        failure = None
        try:
            read(value, place)
        except InputError as error:
            failure = None if "\n" not in str(error) else f"more than one line: {error!r}"
        except Exception as error:  # what a user would see as a traceback
            failure = f"{type(error).__name__}: {error} of {value!r:.200}"
        finally:
            shutil.rmtree(place, ignore_errors=True)
        slowest = max(slowest, time.monotonic() - since)
        if slowest > SECONDS:
            failure = failure or f"took {slowest:.0f} s: {value!r:.200}"
        figures.count(failure)

    one()
    figures.note = f"the slowest took {slowest:.2f} s"
    return figures


# Inputs --------------------------------------------------------------------------------------------------


def _kinds() -> dict[str, tuple[st.SearchStrategy[Any], Callable[[Any, Path], object]]]:
    return {
        "IDX files": (st.one_of(st.binary(max_size=200), _headers(), _mutated(_idx())), _read_idx),
        "IDX files in gzip": (_mutated(gzip.compress(_idx())), _read_gzip),
        "images": (
            st.one_of(st.binary(max_size=200), *(_mutated(_picture(kind)) for kind in ("PNG", "JPEG", "GIF", "TIFF"))),
            _read_image,
        ),
        "YAML configurations": (
            st.one_of(st.text(max_size=200), _mutated(RunConfig().to_yaml().encode()), _options()),
            _read_config,
        ),
        "checkpoints with right checksums": (
            st.tuples(st.sampled_from([TENSORS, STATE]), st.integers(0), st.binary(max_size=40)),
            _read_checkpoint,
        ),
        "models from others": (st.one_of(st.binary(max_size=200), _model_headers()), _read_model),
        "names of class folders": (st.lists(_names(), min_size=1, max_size=4, unique=True), _read_folders),
    }


def _mutated(whole: bytes) -> st.SearchStrategy[bytes]:
    """A valid file with some bytes overwritten, or cut off."""
    edits = st.lists(
        st.tuples(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4
    )

    def apply(changes: list[tuple[int, bytes]], length: int) -> bytes:
        content = bytearray(whole)
        for position, new in changes:
            content[position : position + len(new)] = new
        return bytes(content[:length])

    return st.builds(apply, edits, st.one_of(st.just(len(whole)), st.integers(0, len(whole))))


def _idx() -> bytes:
    return struct.pack(">4B3I", 0, 0, 8, 3, 4, 5, 6) + bytes(4 * 5 * 6)


def _headers() -> st.SearchStrategy[bytes]:
    """IDX headers of any type, number of axes and sizes, with little behind them."""
    sizes = st.lists(st.integers(0, 2**32 - 1), max_size=5)
    return st.builds(
        lambda kind, axes, sizes, rest: struct.pack(f">4B{len(sizes)}I", 0, 0, kind, axes, *sizes) + rest,
        st.integers(0, 255),
        st.integers(0, 255),
        sizes,
        st.binary(max_size=50),
    )


def _picture(kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.arange(24 * 20 * 3, dtype=np.uint8).reshape(24, 20, 3)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _options() -> st.SearchStrategy[bytes]:
    """Options that exist, with values of any kind."""
    values: st.SearchStrategy[Any] = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.dates(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=4,
    )
    names = st.sampled_from(sorted(RunConfig.model_fields))
    return st.builds(lambda options: yaml.safe_dump(options).encode(), st.dictionaries(names, values, max_size=3))


def _model_headers() -> st.SearchStrategy[bytes]:
    """safetensors files whose header promises anything."""
    sizes = st.integers(-1, 2**63)
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "I64", "BF16", "F8", "X"]),
            "shape": st.lists(sizes, max_size=4),
            "data_offsets": st.lists(sizes, min_size=1, max_size=3),
        }
    )
    metadata = st.dictionaries(
        st.sampled_from(["model", "classes", "channels", "image_size", "mean", "std"]),
        st.one_of(
            st.text(max_size=10), st.just("[" * 5000), st.just("9" * 5000), st.integers().map(str), st.just('["a"]')
        ),
    )
    names = st.sampled_from(["conv1.weight", "fc2.bias", "x"])
    header = st.builds(
        lambda tensors, metadata: {**tensors, "__metadata__": metadata},
        st.dictionaries(names, entry, max_size=3),
        metadata,
    )

    def build(header: dict[str, Any], length: int | None, rest: bytes) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + rest

    return st.builds(build, header, st.none() | st.integers(0, 2**64 - 1), st.binary(max_size=64))


def _names() -> st.SearchStrategy[str]:
    """What a file system takes as the name of a folder."""
    characters = st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"])
    names = st.text(characters, min_size=1, max_size=40)
    return names.filter(lambda name: name not in (".", "..") and len(name.encode()) < 255)


# Readers -------------------------------------------------------------------------------------------------


def _read_idx(content: bytes, place: Path) -> object:
    (place / "file").write_bytes(content)
    return read_idx(place / "file", 3)


def _read_gzip(content: bytes, place: Path) -> object:
    (place / "file.gz").write_bytes(content)
    return read_idx(place / "file.gz", 3)


def _read_image(content: bytes, place: Path) -> object:
    (place / "picture.png").write_bytes(content)
    return read_square(place / "picture.png", 16)


def _read_config(content: str | bytes, place: Path) -> object:
    (place / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    return make_config({}, place / "config.yaml")


def _read_checkpoint(value: tuple[str, int, bytes], place: Path) -> object:
    """Written over at one place, and its checksums made to fit, as somebody would who wants it loaded."""
    name, position, new = value
    path = write_checkpoint(
        place, "epoch_00001", pack({"a": {"1": [np.float64(0.5).item()]}, "b": "text", "t": _TENSOR})
    )
    contents = {file: (path / file).read_bytes() for file in (TENSORS, STATE)}
    start = position % len(contents[name])
    contents[name] = contents[name][:start] + new + contents[name][start + len(new) :]
    for file, content in {**contents, SUMS: _sums(contents)}.items():
        (path / file).write_bytes(content)
    return load_checkpoint(path)


def _read_model(content: bytes, place: Path) -> object:
    (place / "config.yaml").write_text("model: simple_cnn\n")
    (place / "model.safetensors").write_bytes(content)
    return load_run(place)


def _read_folders(names: list[str], place: Path) -> object:
    for name in names:
        folder = place / "data" / name
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(_PICTURE)
    return read_folders(place / "data", 16)


_PICTURE = _picture("PNG")
_TENSOR = torch.zeros(3)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """No more address space than MEMORY beyond what is there: what wants more fails, and is counted."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
