"""Optimizer, learning-rate schedule and moving average of the weights, as configured."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .config import RunConfig


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or Nesterov SGD over all trainable parameters, as fused kernels."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    optimizer = torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if config.momentum > 0:
        # torch takes uninitialised memory for them and fills it in the first step; if that is skipped, it stays so.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_scheduler(config: RunConfig, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Learning rate by optimizer step: one-cycle, cosine or constant, the latter two with linear warm-up."""
    if config.schedule == "onecycle":
        # A rise within a single step is none, and torch's schedule divides by its length less one.
        rise = config.warmup_share if config.warmup_share * steps > 1.5 else 0.0
        return OneCycleLR(optimizer, max_lr=config.lr, total_steps=steps, pct_start=rise, cycle_momentum=True)
    warmup = round(config.warmup_share * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(optimizer, factor)


def make_ema(config: RunConfig, model: nn.Module) -> AveragedModel | None:
    """An exponential moving average of weights and buffers, or None."""
    if config.ema == 0:
        return None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    average.requires_grad_(False)
    return average
