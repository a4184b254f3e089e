"""The estimate of a dry run, against the arithmetic written out."""

import pytest

from distributed_batchcam.config import RunConfig
from distributed_batchcam.data import load_data
from tune.dry_run import describe, estimate, train_images
from tune.space import Space


def test_training_images_are_those_that_a_run_trains_on() -> None:
    for valid_size in (None, 0, 200):
        config = RunConfig(dataset="digits", valid_size=valid_size)
        assert train_images(config) == len(load_data("digits", valid_size=valid_size).train)
    assert train_images(RunConfig(dataset="mnist")) == 55_000
    assert train_images(RunConfig(dataset="decoy_fashion_mnist", valid_size=0)) == 60_000


def test_a_large_model_costs_its_operations_and_a_small_one_its_steps() -> None:
    large = estimate(RunConfig(dataset="mnist", model="resnet18", epochs=10, valid_size=0, batch_size=256), 10)
    operations = 0.456e9 * 2 * 3 * 60_000 * 10  # 0.456 GFLOPs of the paper are multiply-adds
    assert large.operations == pytest.approx(operations, rel=2e-3)
    assert large.hours == pytest.approx(operations / 1e13 / 3600, rel=2e-3)
    small = estimate(RunConfig(dataset="mnist", model="simple_cnn", epochs=10, valid_size=0, batch_size=100), 10)
    assert small.hours == pytest.approx(600 * 10 * 2e-3 / 3600)


def test_every_trial_has_a_line_up_to_a_limit() -> None:
    trials = Space(fixed={"dataset": "digits"}, grid={"seed": list(range(70))}).trials()
    lines = describe(trials, "", 10).splitlines()
    assert lines[0] == f"{trials[0].name}  3 epochs"
    assert lines[60] == "… and 10 more"
    assert lines[61] == "70 trials, 210 epochs"
    assert lines[62].startswith("about ")
    assert "GPU-hours" in lines[62]
