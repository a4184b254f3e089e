"""A trained model as its auditors use it: images in [0, 1] to probabilities and maps, weights untouched."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cam import grad_cam
from .distances import resize_maps
from .models import CAMModel, CAMOutput


@dataclass(frozen=True)
class Explainer:
    """A model with the normalisation of its images; use it within `frozen(model)`."""

    model: CAMModel
    normalize: Callable[[Tensor], Tensor]
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(self, images: Tensor) -> CAMOutput:
        """Logits and features, with the graph of the head, of images (N, ch, h, w) in [0, 1]."""
        with torch.enable_grad(), self.autocast():
            return self.model(self.normalize(images))

    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (N, C) of images (N, ch, h, w) in [0, 1]."""
        with torch.no_grad(), self.autocast():
            return self.model(self.normalize(images)).logits.softmax(1)

    def maps(self, images: Tensor, classes: Tensor, size: tuple[int, int]) -> Tensor:
        """Grad-CAM (N, *size) of images (N, ch, h, w) in [0, 1] for `classes` (N,)."""
        return maps_of(self(images), classes, size)


def maps_of(output: CAMOutput, classes: Tensor | None, size: tuple[int, int] | None = None) -> Tensor:
    """Grad-CAM of a model's output for `classes` (N,), None: the predicted ones; resized if a `size` is given."""
    maps = grad_cam(output.logits, output.features, classes, alpha=output.alpha, validate=False)
    return maps if size is None else resize_maps(maps, size)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradients for the weights: a graph then holds the head alone, from the features on."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
