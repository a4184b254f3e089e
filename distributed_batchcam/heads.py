"""Heads, from feature maps to logits: which of them know α, the channel weights of Grad-CAM, without being asked.

α is the spatial mean of the logit's gradient at the maps. Three kinds of heads need no gradient of that size:

* the mean of every map, then one linear layer W: α = W[c] / (H·W);
* the mean of every map, then anything, g: α = ∂g_c/∂mean / (H·W);
* a network that says itself (`SelfExplaining`), as `SimpleCNN` does.

The first two are found by inspection: by a trial on random maps. All others are left to autograd, whose α is
the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cam import Alpha, gradient_of_logits
from .class_sums import SummedAlpha, count_by_class, sum_by_class

ForwardHead = Callable[[Tensor], Tensor]
"""Maps (N, K, H, W) to logits (N, C)."""


class HeadOutput(NamedTuple):
    """Logits (N, C), and what gives their α: None where autograd has to."""

    logits: Tensor
    alpha: Alpha | None


@runtime_checkable
class SelfExplaining(Protocol):
    """A network whose head knows its α."""

    def explained_head(self, features: Tensor) -> HeadOutput:
        """Maps (N, K, H, W) to logits and α."""


class MeanPooling(NamedTuple):
    """What is known of a head g(mean-pool(A))."""

    linear: str | None = None
    """Name of the module that g is, if g is one linear layer."""

    def __call__(self, network: nn.Module, forward_head: ForwardHead, features: Tensor) -> HeadOutput:
        """Logits by the network's own head, which takes the mean of a 1×1 map to be itself."""
        positions = features.shape[2] * features.shape[3]
        pooled = features.mean((2, 3), keepdim=True)
        logits = forward_head(pooled)
        if self.linear is not None:
            classifier = network.get_submodule(self.linear)
            assert isinstance(classifier, nn.Linear)
            return HeadOutput(logits, LinearAlpha(classifier.weight, positions))
        return HeadOutput(logits, PooledAlpha(logits, pooled, positions))


@dataclass(frozen=True)
class LinearAlpha(SummedAlpha):
    """α of a mean and a linear layer W: α = W[c] / (H·W)."""

    weight: Tensor  # W (C, K)
    positions: int  # H·W

    def __call__(self, classes: Tensor) -> Tensor:
        """Classes (N,) to α (N, K)."""
        return self.weight.index_select(0, classes) / self.positions

    def class_sums(self, targets: Tensor) -> Tensor:
        """Targets (N,) to N_c·W[c] / (H·W), (C, K)."""
        return self.weight * (count_by_class(targets, len(self.weight)) / self.positions)[:, None].to(self.weight.dtype)


@dataclass(frozen=True)
class PooledAlpha:
    """α of a mean and anything, g: α = ∂g_c/∂mean / (H·W)."""

    logits: Tensor  # (N, C)
    pooled: Tensor  # (N, K, 1, 1)
    positions: int  # H·W

    def __call__(self, classes: Tensor) -> Tensor:
        """Classes (N,) to α (N, K)."""
        return gradient_of_logits(self.logits, self.pooled, classes)[:, :, 0, 0] / self.positions


@dataclass(frozen=True)
class HiddenAlpha(SummedAlpha):
    """α of max-pooling, flattening, a linear layer W1, ReLU and a linear layer W2.

    Max-pooling hands a gradient on to one position of each window, and so keeps its sum over positions. That sum
    is W1's over positions, weighted by the gradient at the hidden layer h = W1·pooled + b1:
    α_i = (W2[c] ⊙ [h_i > 0]) · Σ_{u,v} W1 / (H·W).
    """

    hidden: Tensor  # h (N, M)
    first: Tensor  # W1 (M, K, pooled positions)
    second: Tensor  # W2 (C, M)
    positions: int  # H·W, before pooling

    def __call__(self, classes: Tensor) -> Tensor:
        """Classes (N,) to α (N, K)."""
        return self._through_first(self.second.index_select(0, classes), self.hidden > 0)

    def class_sums(self, targets: Tensor) -> Tensor:
        """Targets (N,) to Σ_{i: y_i = c} α_i, (C, K): W2[c] stands outside of the sum."""
        active = sum_by_class((self.hidden > 0).to(self.hidden.dtype), targets, len(self.second))
        return self._through_first(self.second, active)

    def _through_first(self, second: Tensor, active: Tensor) -> Tensor:
        # Divided where no gradient goes.
        return (second * (active.to(second.dtype) / self.positions)) @ self.first.sum(2)


@torch.no_grad()
def find_mean_pooling(
    network: nn.Module, forward_head: ForwardHead, features: Tensor, modules: Sequence[nn.Module]
) -> MeanPooling | None:
    """Find out whether a head is g(mean-pool(A)), and whether g is a linear layer.

    Args:
        network: in eval mode.
        forward_head: its head.
        features: (N, K, H, W) for their shape; tried on random numbers.
        modules: of the head, those that ran.
    """
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(features.shape, generator=generator).to(features)
    means = maps.mean((2, 3), keepdim=True)
    logits = forward_head(maps)
    # What changes between the samples is the yardstick: a head of zeros would agree with anything.
    effect = (logits - logits.flip(0)).abs().max()

    def agrees(others: Tensor) -> bool:
        return bool(effect > 0 and (logits - others).abs().max() <= 1e-4 * effect)

    try:
        # Pooling first must then change nothing but rounding.
        if not agrees(forward_head(means)):
            return None
    except RuntimeError:  # the head wants this very map size
        return None
    parametric = [module for module in modules if next(module.parameters(recurse=False), None) is not None]
    names = {module: name for name, module in network.named_modules()}
    if len(parametric) == 1 and isinstance(parametric[0], nn.Linear) and _draws_nothing(network, forward_head, means):
        classifier = parametric[0]
        if agrees(F.linear(means.flatten(1), classifier.weight, classifier.bias)):
            return MeanPooling(names[classifier])
    return MeanPooling()


def _draws_nothing(network: nn.Module, forward_head: ForwardHead, maps: Tensor) -> bool:
    """Whether training mode changes nothing: dropout would."""
    expected = forward_head(maps)
    with torch.random.fork_rng(devices=[]):
        modes = [(module, module.training) for module in network.modules()]
        network.train()
        try:
            return torch.equal(forward_head(maps), expected)
        finally:
            for module, mode in modes:
                module.training = mode
