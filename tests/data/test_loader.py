import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_batchcam import compute_prototypes
from distributed_batchcam.data import Loader, dataset_prototypes, load_data
from distributed_batchcam.data import loader as module
from distributed_batchcam.data.images import FileImages, TensorImages
from distributed_batchcam.errors import InputError

CPU = torch.device("cpu")


def numbered(count, classes=3):
    """Images that show their own number, so that a batch tells what is in it."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return TensorImages(images, torch.arange(count) % classes)


def indices(loader, epoch=0, start=0):
    return [batch.indices.tolist() for batch in loader.epoch(epoch, start)]


def flat(lists):
    return [value for values in lists for value in values]


@pytest.fixture
def files(tmp_path, write_images):
    root = write_images(tmp_path, count=11)
    return load_data("imagefolder", data_root=root, image_size=8, valid_size=0, cache_images="no").train


class Counting(FileImages):
    """Remembers which images were decoded."""

    def __init__(self, files):
        super().__init__(files.root, files.paths, files.targets, files.size)
        self.decoded_indices = []

    def __getitem__(self, index):
        self.decoded_indices.append(index)
        return super().__getitem__(index)


def test_batch_holds_the_images_and_targets_of_its_indices():
    images = numbered(10)
    for batch in Loader(images, 4, CPU, shuffle=True, seed=3).epoch(2):
        assert batch.images.dtype == torch.float32
        assert batch.images.shape[1:] == (1, 2, 2)
        assert torch.equal(batch.images[:, 0, 0, 0], batch.indices / 255)
        assert torch.equal(batch.targets, images.targets[batch.indices])
        assert (batch.targets.dtype, batch.indices.dtype) == (torch.int64, torch.int64)


def test_white_is_exactly_one():
    images = TensorImages(torch.full((2, 3, 4, 4), 255, dtype=torch.uint8), torch.arange(2))
    assert all((batch.images == 1).all() for batch in Loader(images, 2, CPU).epoch())


def test_without_shuffling_the_set_keeps_its_order_and_last_batch():
    loader = Loader(numbered(10), 4, CPU)
    assert len(loader) == 3
    assert indices(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [batch.batch_size for batch in loader.epoch()] == [4, 4, 2]


def test_ragged_last_batch_is_dropped_on_request():
    loader = Loader(numbered(10), 4, CPU, drop_last=True)
    assert len(loader) == 2
    assert indices(loader) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert indices(Loader(numbered(8), 4, CPU, drop_last=True)) == indices(Loader(numbered(8), 4, CPU))


def test_order_is_the_documented_one():
    state = np.random.SeedSequence((7, 3)).generate_state(1, np.uint64)
    expected = torch.randperm(50, generator=torch.Generator().manual_seed(int(state[0])))
    batches = indices(Loader(numbered(50), 8, CPU, shuffle=True, seed=7), 3)
    assert flat(batches) == expected.tolist()


def test_order_depends_on_seed_and_epoch_alone():
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            torch.manual_seed(seed + epoch)
            loader = Loader(numbered(100), 100, CPU, shuffle=True, seed=seed)
            orders[seed, epoch] = indices(loader, epoch)[0]
            assert indices(loader, epoch)[0] == orders[seed, epoch]
    assert len(set(map(tuple, orders.values()))) == 9


@settings(deadline=None)
@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    world_size=st.sampled_from([1, 2, 3, 4, 7]),
    shuffle=st.booleans(),
)
def test_ranks_share_each_global_batch_of_one_process(count, batch_size, world_size, shuffle):
    images = numbered(count)
    whole = list(Loader(images, batch_size, CPU, shuffle=shuffle).epoch(1))
    ranks = [
        list(Loader(images, batch_size, CPU, shuffle=shuffle, rank=rank, world_size=world_size).epoch(1))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {len(whole)}
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert flat(share.indices.tolist() for share in shares) == batch.indices.tolist()
        sizes = [len(share.indices) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert {share.batch_size for share in shares} == {len(batch.indices)} == {batch.batch_size}
        assert torch.equal(torch.cat([share.images for share in shares]), batch.images)
        assert torch.equal(torch.cat([share.targets for share in shares]), batch.targets)
    seen = flat(batch.indices.tolist() for batch in whole)
    assert sorted(seen) == list(range(count))


def test_empty_share_is_a_batch_of_no_samples(files):
    for images in (numbered(5), files):
        shares = [list(Loader(images, 2, CPU, rank=rank, world_size=3).epoch()) for rank in range(3)]
        sizes = [[len(share.indices) for share in batches] for batches in zip(*shares, strict=True)]
        assert min(map(min, sizes)) == 0
        for batches in shares:
            for batch in batches:
                assert batch.images.shape == (len(batch.indices), *images.shape)
                assert batch.images.dtype == torch.float32
                assert len(batch.targets) == len(batch.indices)


@pytest.mark.parametrize("start", range(4))
def test_start_skips_global_batches(start):
    loader = Loader(numbered(10), 4, CPU, shuffle=True, rank=1, world_size=2)
    assert indices(loader, 5, start) == indices(loader, 5)[start:]
    sizes = [batch.batch_size for batch in loader.epoch(5)]
    assert [batch.batch_size for batch in loader.epoch(5, start)] == sizes[start:]


@pytest.mark.parametrize("start", [-1, 4])
def test_start_beyond_the_epoch_is_refused(start):
    with pytest.raises(ValueError, match="start must be within 0 … 3"):
        Loader(numbered(10), 4, CPU).epoch(0, start)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_of_memory(files, workers):
    memory = files.decoded()
    for rank in range(2):
        options = {"shuffle": True, "seed": 1, "rank": rank, "world_size": 2}
        streaming = Loader(files, 5, CPU, workers=workers, **options)
        for epoch, start in ((0, 0), (1, 2), (1, 0)):
            streamed = list(streaming.epoch(epoch, start))
            resident = list(Loader(memory, 5, CPU, **options).epoch(epoch, start))
            assert len(streamed) == len(resident) > 0
            for one, other in zip(streamed, resident, strict=True):
                assert torch.equal(one.images, other.images)
                assert torch.equal(one.targets, other.targets)
                assert torch.equal(one.indices, other.indices)
                assert one.batch_size == other.batch_size


def test_only_this_ranks_images_from_start_on_are_decoded(files):
    images = Counting(files)
    loader = Loader(images, 4, CPU, shuffle=True, rank=1, world_size=2)
    expected = flat(indices(loader)[2:])
    images.decoded_indices.clear()
    list(loader.epoch(0, 2))
    assert images.decoded_indices == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_left_early_does_not_disturb_the_next(files, workers):
    loader = Loader(files, 2, CPU, shuffle=True, workers=workers)
    expected = [batch.images for batch in Loader(files, 2, CPU, shuffle=True).epoch(1)]
    next(loader.epoch(0))
    again = [batch.images for batch in loader.epoch(1)]
    assert all(torch.equal(one, other) for one, other in zip(expected, again, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_two_epochs_at_once_are_refused_rather_than_mixed(files, workers):
    loader = Loader(files, 2, CPU, workers=workers)
    first = loader.epoch(0)
    next(first)
    second = loader.epoch(1)
    next(second)
    with pytest.raises(RuntimeError, match="another epoch"):
        next(first)
    assert sum(1 for _ in second) == len(loader) - 1


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_in_a_stream_is_one_line(files, workers):
    files.paths[3].write_bytes(b"damaged")
    one_line = rf"\Aimage {re.escape(str(files.paths[3]))} cannot be read.*\Z"
    with pytest.raises(InputError, match=one_line):
        list(Loader(files, 4, CPU, workers=workers).epoch())


def test_global_random_state_is_left_alone(files):
    state = torch.get_rng_state()
    for images, workers in ((numbered(9), 0), (files, 0), (files, 1)):
        list(Loader(images, 4, CPU, shuffle=True, workers=workers).epoch())
        assert torch.equal(torch.get_rng_state(), state)


def test_images_go_to_a_device_once():
    images = numbered(4)
    assert images.on(CPU) is images.images
    assert images.on(torch.device("meta")) is images.on(torch.device("meta"))
    assert images.on(torch.device("meta")).device.type == "meta"


def test_impossible_loaders_are_refused():
    with pytest.raises(InputError, match="batch size must be at least 1, got 0"):
        Loader(numbered(4), 0, CPU)
    with pytest.raises(InputError, match="batch size 5 is above the number of training images, 4"):
        Loader(numbered(4), 5, CPU, drop_last=True)
    assert len(Loader(numbered(4), 4, CPU, drop_last=True)) == len(Loader(numbered(4), 5, CPU)) == 1
    for rank, world_size in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank must be"):
            Loader(numbered(4), 2, CPU, rank=rank, world_size=world_size)


# --- prototypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_prototypes_in_chunks_are_those_of_all_images_at_once(monkeypatch, channels, normalize):
    monkeypatch.setattr(module, "_PROTOTYPE_VALUES", 7 * channels * 25)
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, channels, 5, 5), dtype=torch.uint8, generator=random)
    targets = torch.randint(0, 4, (40,), generator=random)
    prototypes = dataset_prototypes(TensorImages(images, targets), 4, normalize=normalize)
    expected = compute_prototypes(images.double() / 255, targets, 4, normalize=normalize)
    assert prototypes.dtype == torch.float32
    torch.testing.assert_close(prototypes.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_prototypes_of_streamed_images(files, workers, monkeypatch):
    monkeypatch.setattr(module, "_PROTOTYPE_VALUES", 5 * 3 * 64)
    assert torch.equal(dataset_prototypes(files, 2, workers=workers), dataset_prototypes(files.decoded(), 2))


def test_class_without_an_image_is_named():
    with pytest.raises(InputError, match="no image of class dog, eel:"):
        dataset_prototypes(numbered(6, classes=2), 4, classes=["ant", "bee", "dog", "eel"])
    with pytest.raises(InputError, match="no image of class 2:"):
        dataset_prototypes(numbered(6, classes=2), 3)
