"""A strict reader of IDX files, the format of MNIST and Fashion-MNIST, plain or gzipped.

An IDX file is: two zero bytes, the type of the values, the number of dimensions, each dimension as a
big-endian uint32, then the values. Nothing in a file is believed before it is checked.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from distributed_batchcam.errors import InputError

_UBYTE = 0x08
_MAX_BYTES = 2 * 1024**3


def find_idx(folder: Path, stem: str) -> Path | None:
    """The file `stem` in `folder`, else `stem.gz`, else None."""
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def read_idx(path: Path, dims: int) -> Tensor:
    """The values of an IDX file of unsigned bytes with `dims` dimensions, as a uint8 tensor of that shape.

    Raises:
        InputError: not such a file, damaged, or holding more or fewer bytes than its header says.
    """
    try:
        if path.suffix == ".gz":
            # Typed as the plain file is: GzipFile has all that is used here.
            with gzip.open(path) as packed:
                return _read(cast(BinaryIO, packed), path, dims)
        with path.open("rb") as file:
            return _read(file, path, dims)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it and fetch it again") from error


def _read(file: BinaryIO, path: Path, dims: int) -> Tensor:
    header = file.read(4 + 4 * dims)
    if header[:4] != bytes((0, 0, _UBYTE, dims)) or len(header) < 4 + 4 * dims:
        raise InputError(f"{path} is not an IDX file of unsigned bytes with {dims} dimension(s)")
    shape = [int.from_bytes(header[4 * i : 4 * i + 4], "big") for i in range(1, dims + 1)]
    size = math.prod(shape)
    if not 0 < size <= _MAX_BYTES:
        raise InputError(f"{path}: its header claims {size:,} bytes (shape {shape}); it is damaged")
    # One byte more than announced, so that a longer file shows without being read (a gzip bomb neither).
    values = bytearray(size + 1)
    got = _read_into(file, memoryview(values))
    if got != size:
        found = f"only {got:,}" if got < size else "more"
        raise InputError(f"{path}: its header announces {size:,} values, the file holds {found}; it is damaged")
    return torch.frombuffer(values, dtype=torch.uint8, count=size).view(shape)


def _read_into(file: BinaryIO, buffer: memoryview) -> int:
    """Bytes read until `buffer` is full or the file ends; a gzip stream hands them out piecemeal."""
    total = 0
    while total < len(buffer):
        got: int = file.readinto(buffer[total:])  # type: ignore[attr-defined]
        if not got:
            break
        total += got
    return total
