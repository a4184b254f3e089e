"""Figures that Quantus and torch-cam compute too, compared with theirs."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distributed_batchcam import create_model
from distributed_batchcam.distances import ssim
from distributed_batchcam.explainer import Explainer, frozen, maps_of
from distributed_batchcam.metrics.maps import gini, relevance_mass, relevance_rank
from distributed_batchcam.metrics.perturbation import confidence_change, deletion_insertion, sensitivity

SIZE = (16, 16)


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    """A network whose maps are not constant; black before its normalisation is zero."""
    torch.manual_seed(0)
    model = create_model("simple_cnn", 5, 1, SIZE[0]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5
    return Explainer(model.eval(), lambda images: images)


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(12, 1, *SIZE, dtype=torch.float64)


@pytest.fixture(scope="module")
def classes(explainer: Explainer, images: Tensor) -> Tensor:
    return explainer.probabilities(images).argmax(1)


@pytest.fixture(scope="module")
def maps(explainer: Explainer, images: Tensor, classes: Tensor) -> Tensor:
    with frozen(explainer.model):
        found = explainer.maps(images, classes, SIZE)
    assert (found.amax((1, 2)) > 0).all()
    return found


class Logits(nn.Module):
    """The bare network in a form that the libraries take."""

    def __init__(self, explainer: Explainer) -> None:
        super().__init__()
        self.network = explainer.model.network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.double())  # Quantus predicts in float32


def quantus_scores(
    metric: Any, explainer: Explainer, images: Tensor, classes: Tensor, maps: Tensor, **more: Any
) -> Any:
    return metric(
        model=Logits(explainer).eval(),
        x_batch=images.numpy(),
        y_batch=classes.numpy(),
        a_batch=maps[:, None].numpy().copy(),
        device="cpu",
        **more,
    )


def quantus() -> Any:
    return pytest.importorskip("quantus", reason="quantus cannot be imported", exc_type=ImportError)


def test_relevance_mass_and_rank_are_those_of_quantus(
    explainer: Explainer, images: Tensor, classes: Tensor, maps: Tensor
) -> None:
    masks = images[:, 0] > 0.5
    distinct = maps + 1e-9 * torch.rand_like(maps)  # Quantus breaks ties by the sort; here there are none
    options = {"abs": False, "normalise": False, "disable_warnings": True}
    for metric, ours in (
        (quantus().RelevanceMassAccuracy(**options), relevance_mass),
        (quantus().RelevanceRankAccuracy(**options), relevance_rank),
    ):
        theirs = quantus_scores(metric, explainer, images, classes, distinct, s_batch=masks[:, None].numpy())
        np.testing.assert_allclose(theirs, ours(distinct, masks).numpy(), rtol=1e-9)


def test_sparseness_is_that_of_quantus(explainer: Explainer, images: Tensor, classes: Tensor, maps: Tensor) -> None:
    metric = quantus().Sparseness(abs=False, normalise=False, disable_warnings=True)
    theirs = quantus_scores(metric, explainer, images, classes, maps)
    np.testing.assert_allclose(theirs, gini(maps).numpy(), rtol=1e-5)  # it adds 1e-7 to every pixel


def test_sensitivity_is_that_of_quantus(explainer: Explainer, images: Tensor, classes: Tensor, maps: Tensor) -> None:
    noise = torch.rand(len(images), 3, *images.shape[1:], dtype=torch.float64) * 2 - 1
    draws = iter(range(3))

    def perturb(arr: Any, **ignored: Any) -> Any:
        return arr + 0.1 * noise[:, next(draws)].flatten(1).numpy()

    def explain_func(model: Any, inputs: Any, targets: Any, **ignored: Any) -> Any:
        with frozen(explainer.model):
            return explainer.maps(torch.as_tensor(inputs), torch.as_tensor(targets), SIZE)[:, None].numpy()

    metric = quantus().AvgSensitivity(
        nr_samples=3, abs=False, normalise=False, perturb_func=perturb, disable_warnings=True
    )
    theirs = quantus_scores(metric, explainer, images, classes, maps, explain_func=explain_func)
    with frozen(explainer.model):
        ours = sensitivity(
            lambda x, chosen: explainer.maps(x, chosen, SIZE), images, maps, classes, noise.unbind(1), radius=0.1
        )
    np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-9)


def test_random_logit_is_that_of_quantus(images: Tensor) -> None:
    # Of two classes, the other one is no matter of chance.
    torch.manual_seed(3)
    explainer = Explainer(create_model("simple_cnn", 2, 1, SIZE[0]).double().eval(), lambda x: x)
    classes = torch.arange(len(images)) % 2

    def explain_func(model: Any, inputs: Any, targets: Any, **ignored: Any) -> Any:
        with frozen(explainer.model):
            return explainer.maps(torch.as_tensor(inputs), torch.as_tensor(targets), SIZE)[:, None].numpy()

    def similarity(a: Any, b: Any, **ignored: Any) -> Any:
        return ssim(torch.as_tensor(a).view(-1, *SIZE), torch.as_tensor(b).view(-1, *SIZE)).numpy()

    metric = quantus().RandomLogit(
        similarity_func=similarity, num_classes=2, abs=False, normalise=False, disable_warnings=True
    )
    with frozen(explainer.model):
        output = explainer(images)
        maps = maps_of(output, classes, SIZE)
        ours = ssim(maps, maps_of(output, 1 - classes, SIZE))
    theirs = quantus_scores(metric, explainer, images, classes, maps, explain_func=explain_func)
    np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-9)


def test_deletion_is_the_curve_of_quantus_pixel_flipping(
    explainer: Explainer, images: Tensor, classes: Tensor, maps: Tensor
) -> None:
    distinct = maps + 1e-9 * torch.rand_like(maps)
    metric = quantus().PixelFlipping(
        features_in_step=16, abs=False, normalise=False, perturb_baseline=0.0, disable_warnings=True
    )
    curves = torch.as_tensor(np.array(quantus_scores(metric, explainer, images, classes, distinct, softmax=True)))
    before = explainer.probabilities(images).gather(1, classes[:, None])
    theirs = torch.trapezoid(torch.cat([before, curves], 1), dx=1 / 16)
    ours, _ = deletion_insertion(explainer.probabilities, images, distinct, classes, steps=16)
    np.testing.assert_allclose(theirs.numpy(), ours.numpy(), rtol=1e-6)


class Extractor:
    """Our maps in the form that torch-cam's figures take; its own would be of probabilities, not of logits."""

    def __init__(self, explainer: Explainer, maps: Tensor) -> None:
        self.model = Logits(explainer).eval()
        self.maps = maps

    def __call__(self, class_idx: object, scores: object, **ignored: object) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    def _hooks_off(self) -> AbstractContextManager[None]:
        return nullcontext()


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def test_average_drop_and_increase_are_those_of_torch_cam(
    explainer: Explainer, images: Tensor, classes: Tensor, maps: Tensor
) -> None:
    metrics = pytest.importorskip("torchcam.metrics", reason="torchcam is not installed")
    metric = metrics.ClassificationMetric(Extractor(explainer, maps), softmax)
    metric.update(images, classes.tolist())
    before = explainer.probabilities(images).gather(1, classes[:, None])[:, 0]
    drop, increase = confidence_change(explainer.probabilities, images, maps, classes, before)
    assert metric.summary()["avg_drop"] == pytest.approx(float(drop.mean()), rel=1e-5)  # it adds 1e-7 below the line
    assert metric.summary()["conf_increase"] == pytest.approx(float(increase.mean()))


@pytest.mark.parametrize("steps", [7, 20])
def test_deletion_and_insertion_are_those_of_torch_cam(
    explainer: Explainer, images: Tensor, classes: Tensor, maps: Tensor, steps: int
) -> None:
    metrics = pytest.importorskip("torchcam.metrics", reason="torchcam is not installed")
    metric = metrics.DeletionInsertionMetric(Extractor(explainer, maps), softmax, steps=steps)
    metric.update(images, classes.tolist())
    deletion, insertion = deletion_insertion(explainer.probabilities, images, maps, classes, steps)
    assert metric.summary()["deletion_auc"] == pytest.approx(float(deletion.mean()), rel=1e-6)
    assert metric.summary()["insertion_auc"] == pytest.approx(float(insertion.mean()), rel=1e-6)
