"""What happens to a prediction when its image is changed, against loops over images and pixels."""

import pytest
import torch
from torch import Tensor

from distributed_batchcam.metrics.perturbation import confidence_change, deletion_insertion, sensitivity

SIZE, CLASSES = 6, 4


def some_images(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 2, s, s), maps with ties, classes."""
    images = torch.rand(count, 2, SIZE, SIZE, dtype=torch.float64)
    maps = torch.rand(count, SIZE, SIZE, dtype=torch.float64).mul(8).floor().div(8)
    return images, maps, torch.arange(count) % CLASSES


class Linear:
    """Probabilities of a linear model; counts how many images it was shown."""

    def __init__(self) -> None:
        self.weight = torch.randn(CLASSES, 2 * SIZE * SIZE, dtype=torch.float64)
        self.shown = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.shown += len(images)
        return (images.flatten(1) @ self.weight.T).softmax(1)


def test_drop_and_increase_compare_with_the_image_darkened_by_its_map() -> None:
    model, (images, maps, classes) = Linear(), some_images(40)
    before = model(images).gather(1, classes[:, None])[:, 0]
    drop, increase = confidence_change(model, images, maps, classes, before)
    for index in range(len(images)):
        after = float(model(images[index : index + 1] * maps[index])[0, classes[index]])
        p = float(before[index])
        assert float(drop[index]) == pytest.approx(max(0.0, p - after) / p, abs=1e-12)
        assert float(increase[index]) == (after > p)
    assert 0 < increase.sum() < len(images), "the test needs both kinds"


@pytest.mark.parametrize("steps", [1, 4, 7, 36, 100])
def test_deletion_and_insertion_follow_the_curve_pixel_by_pixel(steps: int) -> None:
    model, (images, maps, classes) = Linear(), some_images()
    deletion, insertion = deletion_insertion(model, images, maps, classes, steps)
    size = -(-SIZE * SIZE // steps)
    points = [*range(0, SIZE * SIZE, size), SIZE * SIZE]
    for index in range(len(images)):
        # Python's sort is stable: ties stay in the order of their positions.
        order = sorted(range(SIZE * SIZE), key=lambda pixel: -float(maps[index].flatten()[pixel]))
        for found, starts_full in ((deletion, True), (insertion, False)):
            curve = []
            for count in points:
                picture = images[index].clone() if starts_full else torch.zeros_like(images[index])
                for pixel in order[:count]:
                    row, column = divmod(pixel, SIZE)
                    picture[:, row, column] = 0 if starts_full else images[index, :, row, column]
                curve.append(float(model(picture[None])[0, classes[index]]))
            area = sum(
                (a + b) / 2 * (end - start) / (SIZE * SIZE)
                for a, b, start, end in zip(curve, curve[1:], points, points[1:], strict=False)
            )
            assert float(found[index]) == pytest.approx(area, abs=1e-12)


def test_sensitivity_is_the_mean_relative_change() -> None:
    images, _, classes = some_images()

    def explain(x: Tensor, chosen: Tensor) -> Tensor:
        return x.mean(1).square() * (1 + chosen[:, None, None])

    maps = explain(images, classes)
    noise = torch.rand(len(images), 3, *images.shape[1:], dtype=torch.float64) * 2 - 1
    found = sensitivity(explain, images, maps, classes, noise.unbind(1), radius=0.1)
    for index in range(len(images)):
        changes = []
        for draw in range(3):
            one = explain((images[index] + 0.1 * noise[index, draw])[None], classes[index][None])[0]
            changes.append(float((one - maps[index]).norm() / maps[index].norm()))
        assert float(found[index]) == pytest.approx(sum(changes) / 3, abs=1e-12)


def test_sensitivity_of_a_map_of_zeros_counts_the_draws_in_which_it_appears() -> None:
    images, _, classes = some_images(2)
    noise = torch.zeros(2, 4, *images.shape[1:], dtype=torch.float64)
    noise[1, :3] = 1

    def explain(x: Tensor, chosen: Tensor) -> Tensor:
        return (x - images).mean(1)

    found = sensitivity(explain, images, torch.zeros(2, SIZE, SIZE).double(), classes, noise.unbind(1), radius=0.1)
    assert found.tolist() == [0, 0.75]


def test_no_image_is_no_trouble() -> None:
    model, (images, maps, classes) = Linear(), some_images(0)
    assert [len(part) for part in deletion_insertion(model, images, maps, classes)] == [0, 0]
    assert [len(part) for part in confidence_change(model, images, maps, classes, torch.zeros(0))] == [0, 0]
