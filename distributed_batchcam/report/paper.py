"""The accuracies that the paper prints."""

import csv
from functools import cache
from importlib.resources import files
from typing import NamedTuple


class Setting(NamedTuple):
    """What the paper's tables tell apart."""

    model: str
    dataset: str
    objective: str
    image_size: int


def paper_accuracy(setting: Setting) -> float | None:
    """Test accuracy in percent (paper, Tables A1 and 2), None where the paper has none."""
    return paper_table().get(setting)


@cache
def paper_table() -> dict[Setting, float]:
    """Every test accuracy in percent that the paper prints (Tables A1 and 2)."""
    lines = files(__package__).joinpath("paper_accuracy.csv").read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {
        Setting(row["model"], row["dataset"], row["objective"], int(row["image_size"])): float(row["accuracy_percent"])
        for row in rows
    }
