"""Confusion and calibration against scikit-learn, torchmetrics and a loop over bins."""

import math

import pytest
import torch

from distributed_batchcam.metrics.classification import calibration, confusion_matrix


def test_confusion_counts_targets_by_row() -> None:
    from sklearn.metrics import confusion_matrix as theirs

    targets, predicted = torch.randint(4, (200,)), torch.randint(4, (200,))
    assert confusion_matrix(targets, predicted, 4).tolist() == theirs(targets, predicted, labels=range(4)).tolist()


def test_bins_hold_confidence_and_accuracy() -> None:
    confidence, correct = torch.rand(500, dtype=torch.float64), torch.rand(500) > 0.4
    confidence[:2] = torch.tensor([1.0, 0.2])  # edges belong to the bin below
    found = calibration(confidence, correct, bins=5)
    error = 0.0
    for place in range(5):
        inside = [i for i, value in enumerate(confidence.tolist()) if place / 5 < value <= (place + 1) / 5]
        assert int(found.counts[place]) == len(inside)
        mean, share = float(confidence[inside].mean()), float(correct[inside].double().mean())
        assert float(found.confidence[place]) == pytest.approx(mean)
        assert float(found.accuracy[place]) == pytest.approx(share)
        error += len(inside) / 500 * abs(mean - share)
    assert found.error == pytest.approx(error)


def test_an_empty_bin_is_undefined_and_costs_nothing() -> None:
    found = calibration(torch.tensor([0.95, 0.97]), torch.tensor([True, True]), bins=10)
    assert math.isnan(found.accuracy[0])
    assert found.error == pytest.approx(0.04, abs=1e-6)


def test_calibration_error_is_that_of_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    probabilities = torch.randn(400, 6, dtype=torch.float64).softmax(1)
    targets = torch.randint(6, (400,))
    theirs = torchmetrics.functional.calibration_error(
        probabilities, targets, task="multiclass", num_classes=6, n_bins=15, norm="l1"
    )
    confidence, predicted = probabilities.max(1)
    assert calibration(confidence, predicted == targets).error == pytest.approx(float(theirs), abs=1e-6)
