"""Distances and resizing against loops over pixels, and SSIM against `pytorch_msssim` too."""

import oracles
import pytest
import pytorch_msssim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from distributed_batchcam.distances import DISTANCES, resize_maps, ssim, ssim_distance, ssim_to_each

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SIZES = [(1, 1), (2, 2), (3, 3), (4, 4), (7, 5), (6, 10), (10, 10), (11, 11), (12, 12), (11, 3), (20, 14)]
EXPONENTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 0, 1), (0, 1, 0), (0.5, 1.5, 0.5), (1, 0.5, 1.5)]


def two_maps(size: tuple[int, int], samples: int = 3) -> tuple[Tensor, Tensor]:
    """Related maps (so that the structure term is not near 0), the last pair of opposite structure."""
    x = torch.rand(samples, *size, dtype=torch.float64)
    y = 0.6 * x + 0.4 * torch.rand(samples, *size, dtype=torch.float64)
    y[-1] = 1 - x[-1]
    return x, y


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", DISTANCES)
def test_distance_is_that_of_a_loop_over_pixels(name: str, size: tuple[int, int], device: torch.device) -> None:
    x, y = two_maps(size)
    expected = [oracles.distance(name, a, b) for a, b in zip(x, y, strict=True)]
    found = DISTANCES[name](x.to(device), y.to(device)).cpu()
    assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_distances_known_by_hand() -> None:
    x = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    y = torch.tensor([[[0.0, 0.0], [1.0, 0.5]]])
    assert DISTANCES["l1"](x, y).tolist() == [0.375]
    assert DISTANCES["l2"](x, y).tolist() == [0.3125]
    # One pixel, no variance: only the luminance (C1)/(1 + C1) is left.
    black, white = torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()
    assert_close(ssim(black, white).item(), 1e-4 / (1 + 1e-4), **EXACT)


# --- SSIM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
def test_ssim_is_that_of_a_loop_over_windows(
    size: tuple[int, int], exponents: tuple[float, float, float], device: torch.device
) -> None:
    x, y = two_maps(size)
    expected = [oracles.ssim(a, b, exponents) for a, b in zip(x, y, strict=True)]
    value = ssim(x.to(device), y.to(device), exponents)
    assert_close(value.cpu(), torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
def test_ssim_is_exact_where_maps_are_flat(exponents: tuple[float, float, float]) -> None:
    """Zeros of a CAM, a flat prototype: σ is 0 there, and c and s are not."""
    x, y = two_maps((16, 16), samples=4)
    x[0, :13] = 0
    y[1, :, 2:] = 0.7
    x[2] = y[2] = 0
    x[3], y[3] = 0.2, 0.9
    expected = [oracles.ssim(a, b, exponents) for a, b in zip(x, y, strict=True)]
    assert_close(ssim(x, y, exponents), torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("size", [2, 3, 4, 8, 10, 11, 12, 28])
def test_ssim_equals_pytorch_msssim(size: int) -> None:
    x, y = two_maps((size, size))
    window = oracles.largest_odd_window(size)
    # Its own window is of float32.
    exact_window = torch.tensor(oracles.gaussian(window), dtype=torch.float64).view(1, 1, 1, -1)
    for win, tolerance in ((exact_window, 1e-12), (None, 1e-6)):
        theirs = pytorch_msssim.ssim(x[:, None], y[:, None], data_range=1, size_average=False, win_size=window, win=win)
        assert_close(ssim(x, y), theirs, rtol=0, atol=tolerance)


@settings(deadline=None, max_examples=50)
@given(height=st.integers(1, 13), width=st.integers(1, 13), seed=st.integers(0, 2**31), zeros=st.booleans())
def test_ssim_is_symmetric_at_most_one_and_one_of_a_map_with_itself(
    height: int, width: int, seed: int, zeros: bool
) -> None:
    maps = torch.rand(2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if zeros:
        maps = (maps - 0.5).relu()
    x, y = maps[:1], maps[1:]
    for exponents in ((1.0, 1.0, 1.0), (0.5, 2.0, 1.0), (1.0, 0.0, 2.0)):
        assert_close(ssim(x, y, exponents), ssim(y, x, exponents), **EXACT)
        assert_close(ssim(x, x, exponents), torch.ones(1, dtype=torch.float64), **EXACT)
        assert ssim(x, y, exponents).item() <= 1 + 1e-12


def test_ssim_of_opposite_structure_is_negative_and_real() -> None:
    x = torch.rand(1, 11, 11, dtype=torch.float64)
    assert ssim(x, 1 - x).item() < 0
    assert ssim(x, 1 - x, (1, 1, 2)).item() > 0
    assert ssim(x, 1 - x, (1, 1, 0.5)).item() == 0


def test_ssim_distance_takes_the_exponents() -> None:
    x, y = two_maps((12, 12))
    assert_close(ssim_distance(x, y, (1, 2, 1)), 1 - ssim(x, y, (1, 2, 1)), **EXACT)
    assert not torch.allclose(ssim_distance(x, y, (1, 2, 1)), ssim_distance(x, y))


@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
@pytest.mark.parametrize("size", [(5, 5), (12, 13)], ids=str)
def test_ssim_gradient_is_that_of_finite_differences(
    exponents: tuple[float, float, float], size: tuple[int, int]
) -> None:
    x, y = two_maps(size, samples=2)
    assert torch.autograd.gradcheck(
        lambda x, y: ssim(x, y, exponents), (x[:1].requires_grad_(), y[:1].requires_grad_())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DISTANCES)
def test_gradients_are_finite_at_flat_and_equal_maps(name: str, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.rand(5, 14, 14, dtype=dtype, device=device)
    y = torch.rand(5, 14, 14, dtype=dtype, device=device)
    x[0] = 0
    x[1] = y[1] = 0
    x[2] = y[2]
    x[3], y[3] = 1, 0.3
    x[4, :, :12] = 0
    for exponents in EXPONENTS if name == "ssim" else EXPONENTS[:1]:
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        value = ssim_distance(a, b, exponents) if name == "ssim" else DISTANCES[name](a, b)
        value.sum().backward()
        assert value.isfinite().all()
        assert a.grad.isfinite().all()
        assert b.grad.isfinite().all()
        assert a.grad[4].any()
        assert a.grad.abs().max() < 100


@pytest.mark.parametrize("exponents", [(1, 1, 1), (1, 2, 1)], ids=str)
def test_ssim_in_float32_is_close_to_float64_even_where_tf32_is_allowed(
    exponents: tuple[float, float, float], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bright maps with faint texture: TF32, cuDNN's default, would be off by far more."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    x = 0.9 + 0.1 * torch.rand(4, 28, 28, dtype=torch.float64, device=device)
    y = (x + 0.02 * torch.rand(4, 28, 28, dtype=torch.float64, device=device)).clamp(max=1)
    value = ssim(x.float(), y.float(), exponents)
    assert value.dtype == torch.float32
    assert_close(value.double(), ssim(x, y, exponents), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_ssim_is_that_of_float32(dtype: torch.dtype, device: torch.device) -> None:
    x, y = (maps.to(device, dtype) for maps in two_maps((14, 14)))
    with torch.autocast(device.type, torch.bfloat16):
        value = ssim(x, y)
    assert value.dtype == torch.float32
    assert torch.equal(value, ssim(x.float(), y.float()))


def test_each_map_counts_alone_and_none_gives_none() -> None:
    x, y = two_maps((9, 9))
    for distance in DISTANCES.values():
        assert_close(distance(x, y), torch.cat([distance(x[i : i + 1], y[i : i + 1]) for i in range(3)]), **EXACT)
        assert distance(x[:0], y[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("x", "y", "exponents", "message"),
    [
        (torch.rand(2, 5, 5), torch.rand(2, 5, 5), (1, -0.5, 1), "exponents must not be negative"),
        (torch.rand(2, 5, 5), torch.rand(2, 5, 6), (1, 1, 1), "one shape .*in common, got .*5, 5.* and .*5, 6"),
        (torch.rand(2, 5, 5), torch.rand(1, 5, 5), (1, 1, 1), "one shape"),
        (torch.rand(5, 5), torch.rand(5, 5), (1, 1, 1), "one shape"),
    ],
)
def test_bad_ssim_input_is_named(x: Tensor, y: Tensor, exponents: tuple[float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssim(x, y, exponents)


# --- resizing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [(1, 1), (3, 3), (5, 4), (8, 8)], ids=str)
@pytest.mark.parametrize("target", [(1, 1), (4, 4), (7, 9), (8, 8), (3, 2)], ids=str)
def test_resize_is_that_of_a_loop_over_pixels(
    source: tuple[int, int], target: tuple[int, int], device: torch.device
) -> None:
    maps = torch.rand(3, *source, dtype=torch.float64)
    expected = torch.stack([oracles.resize(each, target) for each in maps])
    assert_close(resize_maps(maps.to(device), target).cpu(), expected, **EXACT)


def test_resize_to_the_same_size_changes_nothing() -> None:
    maps = torch.rand(2, 6, 7)
    assert resize_maps(maps, (6, 7)) is maps


@pytest.mark.parametrize("size", [(28, 28), (7, 9)])
def test_ssim_to_each_is_ssim_of_every_pair(size: tuple[int, int], device: torch.device) -> None:
    maps = torch.rand(5, *size, dtype=torch.float64, device=device)
    prototypes = torch.rand(3, *size, dtype=torch.float64, device=device)
    prototypes[0] = 0
    found = ssim_to_each(maps, prototypes)
    assert found.shape == (5, 3)
    for row, cam in zip(found, maps, strict=True):
        for value, prototype in zip(row, prototypes, strict=True):
            assert float(value) == pytest.approx(float(ssim(cam[None], prototype[None])), abs=1e-12)
