"""Which λ an objective gets: rules over runs that differ in it, none of which looks at test images."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

Run = Mapping[str, Any]
"""What docs/results holds of a run: its summary, and `config`."""


class Chosen(NamedTuple):
    """The λ of an objective on a data set."""

    dataset: str
    objective: str
    weight: float


def table_weights(runs: Iterable[Run]) -> dict[str, float]:
    """For each objective the largest λ whose validation accuracy is within one standard error of its best.

    The one-standard-error rule of Breiman et al. 1984, with √(p·(1 - p)/n) of the best accuracy p on n held-out images.
    The largest: a loss on explanations is there for the explanations, as long as it costs nothing that validation sees.
    """
    found: dict[str, float] = {}
    for objective, group in _by(runs, lambda run: run["objective"]).items():
        if objective != "baseline":
            best = max(group, key=lambda run: float(run["best_valid_accuracy"]))
            share = best["best_valid_accuracy"] / 100
            least = 100 * (share - math.sqrt(share * (1 - share) / best["config"]["valid_size"]))
            found[objective] = max(run["weight"] for run in group if run["best_valid_accuracy"] >= least)
    return found


def biased_accuracy(runs: list[Run], baseline: Run) -> Run:
    """The largest λ whose accuracy on validation images decoyed like the training set is within a point of the
    baseline's: what anybody can do who knows nothing of the test."""
    near = [run for run in runs if run["valid_accuracy"] >= baseline["valid_accuracy"] - 1]
    return max(near, key=lambda run: float(run["weight"])) if near else min(runs, key=lambda run: float(run["weight"]))


def wrong_reasons(runs: list[Run], baseline: Run) -> Run:
    """The λ with the least CAM mass on the patches of such images, among those within three points."""
    near = [run for run in runs if run["valid_accuracy"] >= baseline["valid_accuracy"] - 3] or runs
    return min(near, key=lambda run: float(run["valid_patch_mass"]))


def unbiased_accuracy(runs: list[Run], baseline: Run) -> Run:
    """The λ with the best accuracy on 500 validation images whose patches say nothing."""
    return max(runs, key=lambda run: float(run["unbiased_valid_accuracy"]))


RULES: dict[str, Callable[[list[Run], Run], Run]] = {
    "biased accuracy": biased_accuracy,
    "unbiased accuracy": unbiased_accuracy,
    "wrong-reason score": wrong_reasons,
}


def decoy_weights(runs: Iterable[Run]) -> dict[str, list[Chosen]]:
    """For each rule the λ of each objective on each decoy data set that has a baseline, that among them with 0."""
    found: dict[str, list[Chosen]] = {rule: [] for rule in RULES}
    for dataset, group in _by(runs, lambda run: run["dataset"]).items():
        by_objective = _by(group, lambda run: run["objective"])
        if "baseline" not in by_objective:  # of a stage that was interrupted
            continue
        (baseline,) = by_objective.pop("baseline")
        for rule, choose in RULES.items():
            found[rule].append(Chosen(dataset, "baseline", 0.0))
            found[rule] += [
                Chosen(dataset, objective, choose(along, baseline)["weight"])
                for objective, along in by_objective.items()
            ]
    return found


def _by(runs: Iterable[Run], key: Callable[[Run], str]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return groups
