"""Figures of predictions: confusion, calibration."""

from typing import NamedTuple

import torch
from torch import Tensor

CALIBRATION_BINS = 15  # as in Guo et al. 2017


class Calibration(NamedTuple):
    """Predictions by confidence, in B bins of equal width over (0, 1]; means are NaN where a bin is empty."""

    counts: Tensor  # (B,)
    confidence: Tensor  # (B,) mean confidence
    accuracy: Tensor  # (B,) share of right predictions

    @property
    def error(self) -> float:
        """Expected calibration error, Σ_b n_b/N·|accuracy_b - confidence_b| (Guo et al. 2017, eq. 3), in [0, 1]."""
        gaps = (self.accuracy - self.confidence).abs().nan_to_num(0)
        return float((self.counts * gaps).sum() / self.counts.sum())


def calibration(confidence: Tensor, correct: Tensor, bins: int = CALIBRATION_BINS) -> Calibration:
    """How often predictions of each confidence are right (reliability diagram; Guo et al. 2017, section 2).

    Args:
        confidence: (N,) probability of the predicted class.
        correct: (N,) whether the prediction is right.
        bins: B; bin b holds confidences in ((b - 1)/B, b/B].
    """
    confidence = confidence.double()
    places = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts, of_confidence, of_right = (
        torch.zeros(bins, dtype=torch.float64).index_add_(0, places, values)
        for values in (torch.ones_like(confidence), confidence, correct.double())
    )
    return Calibration(counts, of_confidence / counts, of_right / counts)


def confusion_matrix(targets: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """(C, C) int64: how many images of class t (rows) were taken for class p (columns)."""
    pairs = targets * num_classes + predicted
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
