"""Small datasets on disk, in the layouts that users have."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def idx_bytes(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return header + values.astype(np.uint8).tobytes()


@pytest.fixture
def write_idx() -> Callable[[Path, np.ndarray], Path]:
    """Writes an IDX file, gzipped where its name ends in .gz."""

    def write(path: Path, values: np.ndarray) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = idx_bytes(values)
        path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
        return path

    return write


@pytest.fixture
def write_mnist(write_idx: Callable[[Path, np.ndarray], Path]) -> Callable[..., Path]:
    """Writes a data set of random images with labels 0, 1, …, 9, 0, … as torchvision's MNIST lies on disk."""

    def write(root: Path, folder: str = "MNIST", train: int = 200, test: int = 50, suffix: str = ".gz") -> Path:
        random = np.random.default_rng(0)
        for part, count in (("train", train), ("t10k", test)):
            raw = root / folder / "raw"
            write_idx(raw / f"{part}-images-idx3-ubyte{suffix}", random.integers(0, 256, (count, 28, 28)))
            write_idx(raw / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
        return root

    return write


@pytest.fixture
def write_images() -> Callable[..., Path]:
    """Writes `count` random PNGs per class below `root`, each of its own colours."""

    def write(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 10, size: int = 12) -> Path:
        random = np.random.default_rng(len(str(root)))
        for name in classes:
            (root / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / f"{i}.png")
        return root

    return write
