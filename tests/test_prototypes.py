"""Prototypes against a loop over images."""

import oracles
import pytest
import torch
from oracles import sample_batch
from torch import Tensor
from torch.testing import assert_close

from distributed_batchcam import compute_prototypes
from distributed_batchcam.prototypes import PrototypeSums

EXACT = {"rtol": 1e-12, "atol": 1e-12}
TARGETS = torch.tensor([2, 0, 1, 1, 3, 0, 1, 4, 4])


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
def test_prototypes_are_those_of_a_loop(in_chans: int, normalize: bool, device: torch.device) -> None:
    images = sample_batch(samples=9, in_chans=in_chans)[0]
    expected = oracles.prototypes(images, TARGETS, 5, normalize)
    found = compute_prototypes(images.to(device), TARGETS.to(device), 5, normalize=normalize)
    assert_close(found.cpu(), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_prototypes_have_the_images_type_and_are_summed_in_float64(dtype: torch.dtype) -> None:
    images = sample_batch(samples=9)[0].to(dtype)
    found = compute_prototypes(images, TARGETS, 5, normalize=False)
    assert found.dtype == dtype
    assert torch.equal(found, oracles.prototypes(images, TARGETS, 5, normalize=False).to(dtype))


def test_prototypes_add_up_over_batches() -> None:
    images = sample_batch(samples=9, in_chans=3)[0]
    sums = PrototypeSums(5)
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        sums.add(images[part], TARGETS[part])
    assert_close(sums.prototypes(), compute_prototypes(images, TARGETS, 5), **EXACT)


def test_normalized_prototypes_span_zero_to_one() -> None:
    found = compute_prototypes(0.2 + 0.1 * sample_batch(samples=9)[0], TARGETS, 5)
    assert found.amin((1, 2)).tolist() == [0] * 5
    assert_close(found.amax((1, 2)), torch.ones(5, dtype=torch.float64), **EXACT)


def test_class_of_blank_images_has_a_prototype_of_zeros() -> None:
    images = sample_batch(samples=9)[0]
    images[TARGETS == 1] = 0.4
    found = compute_prototypes(images, TARGETS, 5)
    assert not found[1].any()
    assert found[[0, 2, 3, 4]].any((1, 2)).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_any_integer_type_names_a_class(dtype: torch.dtype) -> None:
    images = sample_batch(samples=9)[0]
    assert torch.equal(compute_prototypes(images, TARGETS.to(dtype), 5), compute_prototypes(images, TARGETS, 5))


IMAGES = torch.rand(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        (IMAGES, torch.tensor([0, 0]), "no image of class 1: a prototype needs at least one"),
        (IMAGES[:0], torch.tensor([], dtype=torch.int64), "no image of class 0, 1"),
        (IMAGES + 0.5, torch.tensor([0, 1]), r"images must lie in \[0, 1\]"),
        (IMAGES - 0.5, torch.tensor([0, 1]), r"images must lie in \[0, 1\]"),
        (IMAGES * float("nan"), torch.tensor([0, 1]), r"images must lie in \[0, 1\] and be finite"),
        (torch.tensor([1.5, 0, 0]).view(1, 3, 1, 1).expand(2, 3, 4, 4), torch.tensor([0, 1]), r"in \[0, 1\]"),
        ((IMAGES * 255).to(torch.uint8), torch.tensor([0, 1]), "floating point in .*, got torch.uint8"),
        (IMAGES[:, 0], torch.tensor([0, 1]), r"images must have shape \(N, 1 or 3, h, w\), got \(2, 4, 4\)"),
        (IMAGES.expand(2, 2, 4, 4), torch.tensor([0, 1]), r"images must have shape .*, got \(2, 2, 4, 4\)"),
        (IMAGES, torch.tensor([0, 2]), "targets must lie in 0 … 1, got values from 0 to 2"),
        (IMAGES, torch.tensor([0, -1]), "targets must lie in 0 … 1, got values from -1 to 0"),
        (IMAGES, torch.tensor([0.0, 1.0]), "targets must be integers, got torch.float32"),
        (IMAGES, torch.tensor([0, 1, 1]), r"targets must have shape \(2,\), got \(3,\)"),
    ],
)
def test_bad_input_is_named(images: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_prototypes(images, targets, 2)
