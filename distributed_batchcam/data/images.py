"""Sets of labelled images of one size: held in memory, or decoded from files as they are needed."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .image_files import read_square

_CHUNK_VALUES = 1 << 24  # resized at a time, as floats: 64 MiB
_DECODED_AT_A_TIME = 32
_DECODING_THREADS = 16


class ImageSet(ABC):
    """N labelled images of one shape; `targets` (N,) int64 on the CPU, `shape` (ch, s, s)."""

    targets: Tensor
    shape: tuple[int, int, int]
    corners: Tensor | None = None
    """(N,) int64 on the CPU: which of `decoys.CORNERS` an image's patch is in; None where images have none."""

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def __getitem__(self, index: int) -> Tensor:
        """Image `index`: (ch, s, s) uint8."""

    @abstractmethod
    def subset(self, indices: Tensor) -> Self:
        """The images at `indices` (n,), in that order."""


class TensorImages(ImageSet):
    """Images in memory: `images` (N, ch, s, s) uint8 and `targets` (N,) on the CPU.

    `files` are those that they were decoded from, if so; `corners` as for every `ImageSet`.
    """

    def __init__(
        self, images: Tensor, targets: Tensor, *, files: "FileImages | None" = None, corners: Tensor | None = None
    ) -> None:
        self.images = images
        self.targets = targets
        self.files = files
        self.corners = corners
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self._copies: dict[torch.device, Tensor] = {images.device: images}

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]

    def subset(self, indices: Tensor) -> "TensorImages":
        return TensorImages(
            self.images[indices],
            self.targets[indices],
            files=None if self.files is None else self.files.subset(indices),
            corners=None if self.corners is None else self.corners[indices],
        )

    def on(self, device: torch.device) -> Tensor:
        """All images (N, ch, s, s) on `device`; copied there once, whoever asks."""
        if device not in self._copies:
            self._copies[device] = self.images.to(device)
        return self._copies[device]

    def resized(self, size: int) -> "TensorImages":
        """The images at `size`×`size`, bilinear with antialias, rounded to uint8."""
        if self.shape[1:] == (size, size):
            return self
        channels = self.shape[0]
        resized = torch.empty(len(self), channels, size, size, dtype=torch.uint8)
        # In chunks: as floats all at once they would take four times the memory of the result.
        chunk = max(1, _CHUNK_VALUES // (channels * size * size))
        for part, result in zip(self.images.split(chunk), resized.split(chunk), strict=True):
            # Through floats: torch's own uint8 kernel is off by one level here and there.
            scaled = F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
            result.copy_(scaled.round_())
        return TensorImages(resized, self.targets, files=self.files, corners=self.corners)


class FileImages(ImageSet):
    """Images decoded from `paths` below `root` when asked for, always RGB, as `read_square` does."""

    def __init__(self, root: Path, paths: Sequence[Path], targets: Tensor, size: int) -> None:
        self.root = root
        self.paths = paths
        self.targets = targets
        self.size = size
        self.shape = (3, size, size)

    def __getitem__(self, index: int) -> Tensor:
        return read_square(self.paths[index], self.size)

    def subset(self, indices: Tensor) -> "FileImages":
        return FileImages(self.root, [self.paths[i] for i in indices.tolist()], self.targets[indices], self.size)

    def decoded(self) -> TensorImages:
        """All images in memory, decoded by threads (Pillow lets go of the interpreter lock meanwhile).

        Raises:
            InputError: a file that cannot be read.
        """
        images = torch.empty(len(self), *self.shape, dtype=torch.uint8)

        def decode(start: int) -> int:
            chunk = range(start, min(start + _DECODED_AT_A_TIME, len(self)))
            for index in chunk:
                images[index] = self[index]
            return len(chunk)

        starts = range(0, len(self), _DECODED_AT_A_TIME)
        with (
            ThreadPoolExecutor(_DECODING_THREADS) as pool,
            tqdm(total=len(self), desc="decoding", unit=" images", disable=None) as progress,
        ):
            for done in pool.map(decode, starts):
                progress.update(done)
        return TensorImages(images, self.targets, files=self)


class Parts(NamedTuple):
    """A dataset as its reader finds it; a part that is not there is split off later."""

    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet | None = None
    valid: ImageSet | None = None
