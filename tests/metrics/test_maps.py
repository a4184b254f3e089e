"""Figures of maps against their definitions, written the slow way."""

import math

import pytest
import torch
from torch import Tensor

from distributed_batchcam.metrics.maps import consistency, gini, relevance_mass, relevance_rank, unit_maps


def some_maps(count: int = 6, size: int = 5) -> Tensor:
    maps = torch.rand(count, size, size, dtype=torch.float64).sub(0.4).relu()  # with zeros, as after a ReLU
    maps[-1] = 0
    return maps


def some_masks(count: int = 6, size: int = 5) -> Tensor:
    return torch.rand(count, size, size) > 0.6


def rank_by_hand(cam: Tensor, mask: Tensor) -> float:
    """Expected share of hits when equal pixels are put in a random order: each pixel by its chance to be in."""
    values, inside = cam.flatten().tolist(), mask.flatten().tolist()
    places, hits = sum(inside), 0.0
    for value, hit in zip(values, inside, strict=True):
        better, equal = sum(v > value for v in values), sum(v == value for v in values)
        chance = min(max((places - better) / equal, 0), 1)
        hits += chance * hit
    return hits / places


def gini_by_hand(cam: Tensor) -> float:
    """Mean absolute difference of all pairs ÷ twice the mean."""
    values = cam.flatten().tolist()
    differences = sum(abs(a - b) for a in values for b in values) / len(values) ** 2
    return differences / (2 * sum(values) / len(values))


def test_relevance_mass_is_the_share_inside(device: torch.device) -> None:
    maps, masks = some_maps().to(device), some_masks().to(device)
    found = relevance_mass(maps, masks)
    for cam, mask, value in zip(maps[:-1], masks, found, strict=False):
        assert float(value) == pytest.approx(float(cam[mask].sum() / cam.sum()), abs=1e-12)


def test_relevance_rank_is_the_expected_share_of_hits(device: torch.device) -> None:
    maps, masks = some_maps().to(device), some_masks().to(device)
    for cam, mask, value in zip(maps[:-1], masks, relevance_rank(maps, masks), strict=False):
        assert float(value) == pytest.approx(rank_by_hand(cam, mask), abs=1e-12)


def test_a_map_that_is_its_mask_has_all_its_relevance_there() -> None:
    masks = some_masks()
    assert torch.allclose(relevance_mass(masks.double(), masks), torch.ones(6).double())
    assert torch.allclose(relevance_rank(masks.double(), masks), torch.ones(6).double())
    assert torch.allclose(relevance_mass((~masks).double(), masks), torch.zeros(6).double())
    small = masks & (torch.arange(5) < 2)  # less than half, or a rank would have to reach into it
    assert torch.allclose(relevance_rank((~small).double(), small), torch.zeros(6).double())


def test_a_map_of_zeros_counts_as_wrong_and_an_empty_mask_as_undefined() -> None:
    maps, masks = some_maps(), some_masks()
    masks[0] = False
    for measure in (relevance_mass, relevance_rank):
        found = measure(maps, masks)
        assert math.isnan(found[0])
        assert found[-1] == 0
        assert not found[1:].isnan().any()


def test_gini_is_half_the_relative_mean_difference(device: torch.device) -> None:
    maps = some_maps().to(device)
    for cam, value in zip(maps[:-1], gini(maps), strict=False):
        assert float(value) == pytest.approx(gini_by_hand(cam), abs=1e-12)


def test_gini_of_even_maps_is_zero_and_of_one_pixel_almost_one() -> None:
    one_pixel = torch.zeros(1, 5, 5, dtype=torch.float64)
    one_pixel[0, 2, 3] = 7
    assert float(gini(torch.ones(1, 5, 5))) == pytest.approx(0, abs=1e-6)
    assert float(gini(one_pixel)) == pytest.approx(1 - 1 / 25)
    assert float(gini(torch.zeros(1, 5, 5))) == 0


def test_consistency_is_the_mean_cosine_over_all_pairs() -> None:
    maps, targets = some_maps(9), torch.tensor([0, 0, 1, 1, 1, 0, 2, 0, 0])
    units = unit_maps(maps)
    sums, nonzero, counts = torch.zeros(3, 5, 5).double(), torch.zeros(3).double(), torch.bincount(targets)
    sums.index_add_(0, targets, units)
    nonzero.index_add_(0, targets, (maps.amax((1, 2)) > 0).double())
    found = consistency(sums, nonzero, counts)
    for index in (0, 1):
        of_class = [m.flatten() for m in maps[targets == index]]
        pairs = [
            float(a @ b / (a.norm() * b.norm())) if a.any() and b.any() else 0.0
            for i, a in enumerate(of_class)
            for j, b in enumerate(of_class)
            if i != j
        ]
        assert float(found[index]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert math.isnan(found[2]), "a class of one image has no pair"


def test_no_image_is_no_trouble() -> None:
    none = torch.zeros(0, 5, 5)
    masks = torch.zeros(0, 5, 5, dtype=torch.bool)
    assert relevance_mass(none, masks).shape == relevance_rank(none, masks).shape == gini(none).shape == (0,)
