"""Grad-CAM against pytorch-grad-cam, torch-cam and captum, each hooked onto the bare network at a layer by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.cam_libraries import agreement
from benchmarks.predecessor import HookableNetwork
from distributed_batchcam import create_model, grad_cam
from distributed_batchcam.cam import normalize_maps
from distributed_batchcam.distances import resize_maps
from distributed_batchcam.models import CAMModel


def library(module: str) -> Any:
    """A CAM library, or the reason for which there is no test."""
    return pytest.importorskip(
        module, reason=f"{module} cannot be imported; pip install -e '.[comparisons]'", exc_type=ImportError
    )


class Case(NamedTuple):
    """A network, where the libraries find its target layer, and how they get maps from that layer's output."""

    name: str
    image_size: int
    layer: str | None = None  # None: the last step before the head is a bare function, which no hook can watch
    reshape: Callable[[Tensor], Tensor] | None = None


def token_grid(output: Tensor) -> Tensor:
    """(N, 1 + 16, K) with a class token to (N, K, 4, 4)."""
    return output[:, 1:].reshape(len(output), 4, 4, -1).permute(0, 3, 1, 2)


def channels_first(output: Tensor) -> Tensor:
    """(N, H, W, K) to (N, K, H, W)."""
    return output.permute(0, 3, 1, 2)


CNNS = [Case("simple_cnn", 28), Case("resnet18", 28, "layer4"), Case("efficientnet_b0", 64, "bn2")]
TRANSFORMERS = [
    Case("vit_tiny_patch16_224", 64, "blocks.11.norm1", token_grid),
    Case("swin_tiny_patch4_window7_224", 64, "norm", channels_first),
]
on_cnns = pytest.mark.parametrize("case", CNNS, ids=lambda case: case.name)
on_all = pytest.mark.parametrize("case", [*CNNS, *TRANSFORMERS], ids=lambda case: case.name)
chosen_class = pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])


class Explained(NamedTuple):
    """What this package says, and what a library needs to say the same."""

    images: Tensor
    classes: Tensor
    maps: Tensor  # (N, H, W), not normalised
    network: nn.Module
    target: nn.Module


def explained(case: Case, given: bool) -> Explained:
    model = create_model(case.name, 10, 1, case.image_size)
    speak_up(model)
    model.double().eval()
    images = torch.rand(4, 1, case.image_size, case.image_size, dtype=torch.float64)
    logits, features, alpha = model(images)
    classes = torch.tensor([3, 0, 3, 9]) if given else logits.argmax(1)
    maps = grad_cam(logits, features, classes, normalize=False, alpha=alpha)
    assert normalize_maps(maps).flatten(1).any(1).sum() > 1, "constant maps tell nothing"
    if case.layer is None:
        watched = HookableNetwork(model.network)
        return Explained(images, classes, maps, watched, watched.target)
    return Explained(images, classes, maps, model.network, model.network.get_submodule(case.layer))


def speak_up(model: CAMModel) -> None:
    """Untrained heads say much the same of every class: give each its own opinion."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.out_features == 10:
            nn.init.normal_(layer.weight)


@chosen_class
@on_all
def test_maps_are_those_of_torch_cam(case: Case, given: bool) -> None:
    methods = library("torchcam.methods")
    images, classes, maps, network, target = explained(case, given)
    with methods.GradCAM(network, target, reshape_transform=case.reshape) as extractor:
        scores = network(images)
        (theirs,) = extractor(classes.tolist(), scores, normalized=False)
    assert_close(theirs, maps, rtol=1e-9, atol=1e-9 * maps.max().item())
    assert agreement(normalize_maps(maps), theirs).correlation > 0.999


@chosen_class
@on_cnns
def test_maps_are_those_of_captum(case: Case, given: bool) -> None:
    attr = library("captum.attr")
    images, classes, maps, network, target = explained(case, given)
    theirs = attr.LayerGradCam(network, target).attribute(images, target=classes, relu_attributions=True)[:, 0]
    assert_close(theirs, maps, rtol=1e-9, atol=1e-9 * maps.max().item())
    assert agreement(normalize_maps(maps), theirs).correlation > 0.999


@chosen_class
@on_all
def test_maps_at_image_size_are_those_of_pytorch_grad_cam(case: Case, given: bool) -> None:
    """It resizes in float32 and hands out nothing else, hence the wider tolerance."""
    package = library("pytorch_grad_cam")
    images, classes, maps, network, target = explained(case, given)
    size = (case.image_size, case.image_size)
    ours = normalize_maps(resize_maps(normalize_maps(maps), size))
    targets = [package.utils.model_targets.ClassifierOutputTarget(c) for c in classes.tolist()] if given else None
    with package.GradCAM(model=network, target_layers=[target], reshape_transform=case.reshape) as cam:
        theirs = torch.from_numpy(cam(input_tensor=images, targets=targets))
    assert_close(theirs, ours.float(), rtol=0, atol=2e-6)
    assert agreement(ours, theirs).correlation > 0.999
