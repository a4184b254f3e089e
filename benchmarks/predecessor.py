"""Grad-CAM as before Batch-CAM: one image after another. Here only to be measured against.

`gradcam_by_hooks` is the hook-based Grad-CAM of the paper's Algorithm 2; `gradcam_by_loop` is Algorithm 1 read
line by line, with one `autograd.grad` per image. Both give the maps of `distributed_batchcam.grad_cam`.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn


class HookableNetwork(nn.Module):
    """A network in two halves, as the paper's three models are, with a module between them for hooks to hang on.

    Hooks see what goes into and out of modules, and the target layer's last step may be a bare function.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.target = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, ch, h, w) to logits (N, C)."""
        halves: Any = self.network
        logits: Tensor = halves.forward_head(self.target(halves.forward_features(images)))
        return logits


class Hooks:
    """While entered, catches the activations A of a module in the forward pass and ∂S/∂A in the backward pass."""

    activations: Tensor
    gradients: Tensor

    def __init__(self, target: nn.Module) -> None:
        self.target = target

    def __enter__(self) -> Self:
        def catch_activations(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.activations = output.detach()

        def catch_gradients(module: nn.Module, into_inputs: Any, into_output: tuple[Tensor, ...]) -> None:
            self.gradients = into_output[0].detach()

        self.handles = [
            self.target.register_forward_hook(catch_activations),
            self.target.register_full_backward_hook(catch_gradients),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self.handles:
            handle.remove()


def gradcam_by_hooks(model: HookableNetwork, images: Tensor, classes: Tensor | None = None) -> Tensor:
    """Algorithm 2 on a batch: one forward pass, then a backward pass through the whole network for every image.

    For each image i: zero the gradients, `L[i, c_i].backward(retain_graph=True)`, take ∂L/∂A from the backward
    hook and A from the forward hook, α = mean of ∂L/∂A over positions, ReLU(Σ_k α_k A_k), min-max to [0, 1].

    Args:
        model: with parameters that require gradients.
        images: (N, ch, h, w).
        classes: (N,) class c_i of each map; None takes the predicted class.

    Returns:
        (N, H, W) maps without a graph: hooks see detached values, so they are useless as a loss.
    """
    with Hooks(model.target) as hooks:
        return maps_of_hooks(model, model(images), hooks, classes)


def gradcam_by_hooks_alone(model: HookableNetwork, images: Tensor, classes: Tensor | None = None) -> Tensor:
    """Algorithm 2 image by image: for each a forward pass of its own and a backward pass, in batches of one.

    Cheaper than `gradcam_by_hooks` in all but the forward pass: no backward pass carries the other images along.
    Its arguments and maps are the same, for networks that treat the images of a batch independently.
    """
    choices = [None] * len(images) if classes is None else classes[:, None].unbind()
    maps = [gradcam_by_hooks(model, image[None], choice) for image, choice in zip(images, choices, strict=True)]
    return torch.cat(maps)


def maps_of_hooks(model: nn.Module, logits: Tensor, hooks: Hooks, classes: Tensor | None = None) -> Tensor:
    """Algorithm 2 after the forward pass, which gave `logits` (N, C) while `hooks` watched: (N, H, W)."""
    if classes is None:
        classes = logits.detach().argmax(1)
    maps = []
    for index, choice in enumerate(classes.tolist()):
        model.zero_grad()
        logits[index, choice].backward(retain_graph=True)
        maps.append(_map_of_one(hooks.gradients[index], hooks.activations[index]))
    model.zero_grad()
    return torch.stack(maps)


def gradcam_by_loop(
    logits: Tensor, features: Tensor, classes: Tensor | None = None, *, create_graph: bool = True
) -> Tensor:
    """Algorithm 1 read line by line: for each image `autograd.grad(L[i, c_i], A)`, then its weights and its map.

    Args:
        logits: (N, C), computed from `features`.
        features: (N, K, H, W), the output A of the target layer.
        classes: (N,) class c_i of each map; None takes the predicted class.
        create_graph: keep the maps differentiable, for use in a loss.

    Returns:
        (N, H, W) maps.
    """
    if classes is None:
        classes = logits.detach().argmax(1)
    maps = []
    for index, choice in enumerate(classes.tolist()):
        (gradients,) = torch.autograd.grad(
            logits[index, choice], features, create_graph=create_graph, retain_graph=True
        )
        maps.append(_map_of_one(gradients[index], features[index] if create_graph else features[index].detach()))
    return torch.stack(maps)


def _map_of_one(gradients: Tensor, activations: Tensor) -> Tensor:
    """Weights, weighted sum, ReLU and min-max of one image: (K, H, W) twice to (H, W)."""
    weights = gradients.mean((1, 2))
    cam = (weights[:, None, None] * activations).sum(0).relu()
    low, high = cam.min(), cam.max()
    # A map without any contrast stays zero.
    return (cam - low) / (high - low) if high > low else cam * 0
