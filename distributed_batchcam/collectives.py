"""Sums over the ranks of a data-parallel job, each with the autograd rule that it needs.

DDP averages gradients over W ranks, and every rank computes the same CAM loss f(s) from the
all-reduced sum s = Σ_r s_r. On one process ∂f/∂θ = f'(s)·Σ_r ∂s_r/∂θ; DDP yields
1/W·Σ_r g_r·∂s_r/∂θ where g_r is what the backward of the all-reduce hands to rank r. Hence:

* `Upstream.REPLICATED`: every rank arrives with the same upstream gradient f'(s), so g_r = W·f'(s)
  and the backward needs no communication.
* `Upstream.PARTIAL`: each rank arrives with its own share of the gradient (already scaled by W
  further up), so g_r is the all-reduced sum of the shares.

Without a process group, or with one rank, every sum is the identity.
"""

from collections.abc import Sequence
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class Upstream(Enum):
    """What the upstream gradient of an all-reduced sum is on each rank."""

    REPLICATED = "replicated"
    PARTIAL = "partial"


def world_size() -> int:
    """Number of ranks in the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _AllReduceSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, upstream: Upstream, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.upstream = upstream  # type: ignore[attr-defined]
        totals = _all_reduced(tensors)
        needed = ctx.needs_input_grad[1:]  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(*(total for total, need in zip(totals, needed, strict=True) if not need))
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]  # type: ignore[attr-defined]
        wanted = [grad for grad, need in zip(grads, needed, strict=True) if need]
        if ctx.upstream is Upstream.REPLICATED:  # type: ignore[attr-defined]
            totals = iter([grad * world_size() for grad in wanted])
        else:
            totals = iter(_all_reduced(wanted))
        return None, *(next(totals) if need else None for need in needed)


def _all_reduced(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The sums over ranks, in one collective of all the numbers packed flat."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


def all_reduce_sums(tensors: Sequence[Tensor], upstream: Upstream) -> tuple[Tensor, ...]:
    """Differentiable Σ over ranks of each tensor; the module's docstring derives the two backward rules.

    One collective forwards; backwards at most one, of the gradients of those tensors alone that need one.
    """
    if world_size() == 1:
        return tuple(tensors)
    return _all_reduce_sums(upstream, *tensors)


# Where the arithmetic around it is compiled, this divides it in two: compiled code knows no such backward.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _all_reduce_sums(upstream: Upstream, *tensors: Tensor) -> tuple[Tensor, ...]:
    return _AllReduceSums.apply(upstream, *tensors)


def all_reduce_sum(tensor: Tensor, upstream: Upstream) -> Tensor:
    """`all_reduce_sums` of one tensor."""
    (total,) = all_reduce_sums((tensor,), upstream)
    return total


def global_mean(values: Tensor, total: int | None = None) -> Tensor:
    """Mean of per-sample `values` (n,) over the samples of all ranks, as DDP needs it; see `mean_of_sum`."""
    return mean_of_sum(values.sum(), len(values), total)


def mean_of_sum(local: Tensor, samples: int, total: int | None = None) -> Tensor:
    """Mean over the samples of all ranks, from the sum over this rank's samples, as DDP needs it.

    Returns W·Σ_local / N: its average over the ranks, which is what DDP takes of the gradients,
    is the mean over all N samples for any split, ragged or empty on some ranks.

    Args:
        local: Σ_local, a scalar.
        samples: how many it is the sum of.
        total: N, the number of samples on all ranks together, where the caller knows it;
            otherwise one all-reduce of a single number finds it.
    """
    ranks = world_size()
    if total is not None:
        return local * (ranks / total)
    if ranks == 1:
        return local / samples
    count = torch.tensor(samples, device=local.device)
    dist.all_reduce(count)
    return local * ranks / count
