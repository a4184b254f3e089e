"""Schedules run to their end for any number of steps, and rise, fall and decay as they say."""

import pytest
import torch

from distributed_batchcam.config import RunConfig
from distributed_batchcam.optim import make_ema, make_optimizer, make_scheduler


def rates(config: RunConfig, steps: int) -> list[float]:
    optimizer = make_optimizer(config, torch.nn.Linear(2, 2))
    scheduler = make_scheduler(config, optimizer, steps)
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step() if len(seen) < steps else None
    return seen


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [None, 0.0, 0.1, 0.5, 0.9])
def test_any_number_of_steps_has_positive_rates_up_to_the_highest(schedule: str, warmup: float | None) -> None:
    config = RunConfig(schedule=schedule, warmup=warmup, lr=0.5)  # type: ignore[arg-type]
    for steps in (*range(1, 25), 100):
        assert all(0 < rate <= 0.5 + 1e-12 for rate in rates(config, steps))


def test_onecycle_rises_over_its_share_and_falls_to_almost_nothing() -> None:
    seen = rates(RunConfig(schedule="onecycle", lr=1.0, warmup=0.25), 100)
    assert seen.index(max(seen)) == 24
    assert max(seen) == pytest.approx(1.0)
    assert seen[-1] < 1e-3


def test_cosine_is_half_way_down_in_the_middle() -> None:
    seen = rates(RunConfig(schedule="cosine", lr=1.0, warmup=0.0), 100)
    assert seen[0] == 1.0
    assert seen[50] == pytest.approx(0.5)


def test_constant_stays_after_its_warmup() -> None:
    seen = rates(RunConfig(schedule="constant", lr=1.0, warmup=0.1), 100)
    assert seen[:10] == sorted(seen[:10])
    assert seen[0] < 0.2
    assert set(seen[10:]) == {1.0}


def test_moving_average_follows_its_decay() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = make_ema(RunConfig(ema=0.9), model)
    assert average is not None
    average.update_parameters(model)  # the first update copies
    model.weight.data.fill_(2.0)
    average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)
    assert make_ema(RunConfig(ema=0.0), model) is None
