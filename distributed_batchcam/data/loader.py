"""Batches of images on the device: indexed there when the images are in memory, streamed otherwise."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distributed_batchcam.errors import InputError
from distributed_batchcam.prototypes import PrototypeSums

from .images import ImageSet, TensorImages

_STOPPING = (signal.SIGTERM, signal.SIGINT)
_PROTOTYPE_VALUES = 1 << 24  # summed at a time, as floats: 64 MiB


class Batch(NamedTuple):
    """One rank's share of a global batch; it may be empty."""

    images: Tensor  # (n, ch, h, w) float32 in [0, 1], on the device
    targets: Tensor  # (n,) int64, on the device
    indices: Tensor  # (n,) int64 on the CPU: positions in the image set
    batch_size: int  # of the global batch, over all ranks


class Loader:
    """Batches of an image set, in an order that depends on (seed, epoch) alone.

    A global batch is a slice of that order, and rank r holds the r-th share of it: shares differ by one
    sample at most, and put together they are the same batch for every number of ranks. A rank whose share
    is empty gets a batch of 0 samples, so that the ranks stay in step.

    Args:
        images: the image set.
        batch_size: samples in a global batch.
        device: where the batches are wanted.
        rank, world_size: which share is this process's.
        shuffle: in a new order every epoch; otherwise as the set is.
        drop_last: leave out the last global batch where it is smaller than the others.
        seed: of the order.
        workers: processes that decode image files; images in memory need none.

    Raises:
        InputError: a batch size below 1, or with `drop_last` above the number of images.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch size must be at least 1, got {batch_size}")
        if drop_last and batch_size > len(images):
            raise InputError(
                f"batch size {batch_size} is above the number of training images, {len(images)}; choose a smaller one"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be within 0 … {world_size - 1}, got {rank}")
        self.images = images
        self.batch_size = batch_size
        self.device = device
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self._targets = images.targets.to(device)
        self._stream = None if isinstance(images, TensorImages) else _Stream(images, device, workers)

    def __len__(self) -> int:
        """Global batches in an epoch."""
        whole, ragged = divmod(len(self.images), self.batch_size)
        return whole + bool(ragged and not self.drop_last)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from global batch `start` on; what is skipped is not decoded."""
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be within 0 … {len(self)}, got {start}")
        return self._batches(self._order(epoch), range(start, len(self)))

    def _batches(self, order: Tensor, numbers: range) -> Iterator[Batch]:
        shares = [self._share(number) for number in numbers]
        indices = [order[share] for share in shares]
        # The order goes to the device whole: one copy an epoch, which nothing waits for.
        pinned = order.pin_memory() if self.device.type == "cuda" else order
        order_there = pinned.to(self.device, non_blocking=True)
        indices_there = [order_there[share] for share in shares]
        if self._stream is None:
            assert isinstance(self.images, TensorImages)
            resident = self.images.on(self.device)
            pixels: Iterator[Tensor] = (resident.index_select(0, chosen) for chosen in indices_there)
        else:
            pixels = self._stream.read(indices)
        for number, here, there, values in zip(numbers, indices, indices_there, pixels, strict=True):
            yield Batch(
                images=values.float().div_(255),
                targets=self._targets.index_select(0, there),
                indices=here,
                batch_size=min(self.batch_size, len(order) - number * self.batch_size),
            )

    def _order(self, epoch: int) -> Tensor:
        """(N,) positions; from a generator of its own, so that nothing else can change it."""
        if not self.shuffle:
            return torch.arange(len(self.images))
        state = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        return torch.randperm(len(self.images), generator=generator)

    def _share(self, number: int) -> slice:
        """Where this rank's share of global batch `number` lies in the order."""
        first = number * self.batch_size
        size = min(self.batch_size, len(self.images) - first)
        return slice(first + size * self.rank // self.world_size, first + size * (self.rank + 1) // self.world_size)


class _Stream:
    """Images (n, ch, s, s) uint8 on the device, decoded ahead by worker processes that live on."""

    def __init__(self, images: ImageSet, device: torch.device, workers: int) -> None:
        self._device = device
        self._shares = _Shares()
        self._loader = DataLoader(
            _Decoding(images),
            batch_sampler=self._shares,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            # Otherwise each epoch would draw from the global generator, and dropout would depend on it.
            generator=torch.Generator(),
            worker_init_fn=_serve_to_the_end,
        )

    def read(self, shares: list[Tensor]) -> Iterator[Tensor]:
        """The images at each of `shares` in turn; a later call ends an earlier one.

        Raises:
            InputError: a file that cannot be read.
        """
        self._shares.current = shares
        with _deaf():  # the decoders are forked here, and inherit it
            stream = iter(self._loader)
        for _ in shares:
            # The workers serve one epoch at a time, and would hand out the other one's images here.
            if self._shares.current is not shares:
                raise RuntimeError("this loader has begun another epoch; finish one before the next")
            images = next(stream)
            if isinstance(images, str):
                raise InputError(images)
            yield images.to(self._device, non_blocking=True)


@contextmanager
def _deaf() -> Iterator[None]:
    """Let SIGTERM and SIGINT wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve_to_the_end(worker: int) -> None:
    """In a decoder: signals to all processes of a run are the main process's to answer, which needs it until it stops.

    Ctrl-C reaches the whole process group, and schedulers send SIGTERM to every process of a job. Of the main process
    itself SIGTERM is the word to end; should it die without a word, torch ends its decoders within seconds.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    if sys.platform == "darwin":  # which does not say who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    else:
        threading.Thread(target=_obey_main_process, name="signals", daemon=True).start()


def _obey_main_process() -> None:
    while signal.sigwaitinfo(_STOPPING).si_pid != os.getppid():
        pass
    os._exit(0)


class _Shares(Sampler[list[int]]):
    """The index lists of the epoch under way."""

    current: Sequence[Tensor] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return (share.tolist() for share in self.current)

    def __len__(self) -> int:
        return len(self.current)


class _Decoding(Dataset[Tensor]):
    """Decodes a share at a time; of an error the message is handed over, as raised it would be a traceback."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    def __getitems__(self, indices: list[int]) -> Tensor | str:
        decoded = torch.empty(len(indices), *self._images.shape, dtype=torch.uint8)
        try:
            for place, index in enumerate(indices):
                decoded[place] = self._images[index]
        except InputError as error:
            return str(error)
        return decoded


def _unchanged(batch: Any) -> Any:
    return batch


def dataset_prototypes(
    images: ImageSet,
    num_classes: int,
    *,
    device: torch.device | None = None,
    normalize: bool = True,
    classes: Sequence[str] | None = None,
    workers: int = 0,
) -> Tensor:
    """Average image of each class (see `compute_prototypes`), without holding all images as floats.

    Args:
        images: the image set.
        num_classes: C.
        device: where to sum; None: the CPU.
        normalize: min-max scale each prototype.
        classes: names of the classes, for messages.
        workers: processes that decode image files.

    Returns:
        (C, h, w) float32 in [0, 1] on the device.

    Raises:
        InputError: a class without an image.
    """
    names = [str(c) for c in range(num_classes)] if classes is None else classes
    counts = torch.bincount(images.targets, minlength=num_classes).tolist()
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        raise InputError(f"no image of class {', '.join(empty)}: a prototype is the average of one at least")
    channels, height, width = images.shape
    chunk = max(1, _PROTOTYPE_VALUES // (channels * height * width))
    sums = PrototypeSums(num_classes)
    for batch in Loader(images, chunk, device or torch.device("cpu"), workers=workers).epoch():
        sums.add(batch.images, batch.targets)
    return sums.prototypes(normalize=normalize).float()
