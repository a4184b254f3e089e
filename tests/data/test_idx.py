import gzip
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed_batchcam.data.idx import find_idx, read_idx
from distributed_batchcam.errors import InputError

VALUES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def header(*shape: int, magic: tuple[int, ...] = (0, 0, 8, 3)) -> bytes:
    return bytes(magic) + b"".join(n.to_bytes(4, "big") for n in shape)


@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_values_and_shape_come_back(tmp_path, write_idx, name):
    read = read_idx(write_idx(tmp_path / name, VALUES), 3)
    assert read.dtype == torch.uint8
    assert torch.equal(read, torch.from_numpy(VALUES))


def test_unpacked_file_goes_before_gzipped_one(tmp_path):
    assert find_idx(tmp_path, "a") is None
    (tmp_path / "a.gz").touch()
    assert find_idx(tmp_path, "a") == tmp_path / "a.gz"
    (tmp_path / "a").touch()
    assert find_idx(tmp_path, "a") == tmp_path / "a"


BAD = {
    "empty": (b"", "not an IDX file"),
    "foreign": (b"\x89PNG\r\n\x1a\n" + bytes(40), "not an IDX file"),
    "other type": (header(2, 3, 4, magic=(0, 0, 13, 3)) + VALUES.tobytes(), "not an IDX file"),
    "other dimensions": (header(24, magic=(0, 0, 8, 1)) + VALUES.tobytes(), "not an IDX file"),
    "header cut short": (header(2, 3), "not an IDX file"),
    "no values": (header(0, 3, 4), "claims 0 bytes"),
    "absurd header": (header(2**32 - 1, 2**32 - 1, 2**32 - 1) + VALUES.tobytes(), "claims"),
    "header over 2 GiB": (header(2, 2**10, 2**20 + 1) + VALUES.tobytes(), "claims"),
    "truncated": (header(2, 3, 4) + VALUES.tobytes()[:-1], "only 23"),
    "one byte more": (header(2, 3, 4) + VALUES.tobytes() + b"\0", "more"),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("case", BAD)
def test_damaged_file_is_named(tmp_path, case, suffix):
    data, matter = BAD[case]
    path = tmp_path / f"file{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    with pytest.raises(InputError, match=matter) as caught:
        read_idx(path, 3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["checksum", "cut short", "inside", "not gzip"])
def test_damaged_gzip_is_named(tmp_path, damage):
    data = bytearray(gzip.compress(header(2, 3, 4) + VALUES.tobytes()))
    if damage == "checksum":
        data[-8] ^= 1
    elif damage == "cut short":
        del data[-12:]
    elif damage == "inside":
        data[10] ^= 0xFF
    else:
        data[:2] = b"no"
    path = tmp_path / "file.gz"
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_idx(path, 3)
    assert str(path) in str(caught.value)


def test_gzip_bomb_is_not_inflated(tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(header(2, 3, 4) + bytes(64 * 2**20), 1))
    tracemalloc.start()
    with pytest.raises(InputError, match="more"):
        read_idx(path, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_missing_file_is_named():
    with pytest.raises(InputError, match="nowhere"):
        read_idx(Path("nowhere"), 3)
