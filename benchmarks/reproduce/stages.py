"""What is run: each stage is a sweep in a folder of its own, which goes on where it stopped."""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from distributed_batchcam import cli
from distributed_batchcam.errors import InputError
from tune.record import SweepRecord
from tune.space import Options, Space, make_space, read_space
from tune.storage import TRIALS, Storage

from .weights import Chosen

EXPLAINING = ("pl_l1", "pl_l2", "pl_ssim", "bcpl_l1", "bcpl_l2", "bcpl_ssim")
SEEDS = [0, 1, 2]
DECOY_SEEDS = [0, 1, 2, 3, 4]
HELD_OUT = 5000
PLAIN = {"decoy_mnist": "mnist", "decoy_fashion_mnist": "fashion_mnist"}
"""Decoy data sets, and what they are made of."""


@dataclass(frozen=True)
class Workshop:
    """Where stages live, and how their trials run."""

    storage: Path
    sweep_options: Sequence[str] = field(default=())
    """Further options of `batchcam sweep`: --address, --gpus-per-worker, --data-root."""
    missing: bool = False
    """Whether what docs/results holds need not be run."""
    float32: bool = False
    """Whether to run in float32 what the recipes have in bfloat16."""

    def suited(self, space: Space) -> Space:
        """The space as it is run here."""
        return space.with_fixed({"precision": "no"}) if self.float32 else space

    def run(self, name: str, space: Space, elsewhere: Collection[str] = ()) -> None:
        """Run what is left of a stage; one that has come to more trials since it was begun keeps those it has.

        Trials whose id is in `elsewhere` are there already, and not begun.

        Raises:
            InputError: the stage was begun with trials that are none of it now, or trials of it failed.
        """
        folder = self.storage / name
        trials = space.trials()
        record = SweepRecord.load(Storage.at(str(folder))) if folder.is_dir() else None
        begun = set(record.trials) if record else set()
        left = [trial for trial in trials if trial.id in begun or trial.id not in elsewhere]
        if len(left) < len(trials):
            space = space.only(left)
        if record is not None and record.space != space:
            if not begun <= {trial.id for trial in left}:
                raise InputError(f"{folder} was begun with other trials: move it away, or name another --storage")
            record.space = space
            record.save(Storage.at(str(folder)))
        done = (0 if record is None else record.count("finished")) + len(trials) - len(left)
        print(f"batchcam: stage {name}: {done} of {len(trials)} runs are there", flush=True)
        if done == len(trials):
            return
        file = self.storage / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(space.model_dump(mode="json", exclude_none=True), sort_keys=False))
        begin = ["--space", str(file)] if record is None else ["--resume"]
        status = cli.run(["sweep", *begin, "--storage", str(folder), *self.sweep_options])
        if status == 1:
            raise InputError(f"runs of stage {name} failed: see {folder}/sweep.json, then repeat the command")
        if status:
            raise SystemExit(status)

    def runs(self, name: str) -> Iterator[Path]:
        """Run directories of the finished trials of a stage, as far as it got."""
        folder = self.storage / name
        record = SweepRecord.load(Storage.at(str(folder))) if folder.is_dir() else None
        for entry in record.trials.values() if record else ():
            path = folder / TRIALS / entry.name
            if (path / "summary.json").is_file():
                yield path


def weights_space() -> Space:
    """The space `lambda` by the tables' recipe: which λ does each objective get, and what does it cost in accuracy?"""
    return read_space("lambda").with_fixed({**_recipe(), "valid_size": HELD_OUT})


def _recipe() -> Options:
    """The tables' recipe for `simple_cnn`, but for λ."""
    options = read_space("paper").trial({"model": "simple_cnn"}).options
    return {name: value for name, value in options.items() if name != "weight"}


def table_space(model: str, weights: dict[str, float], *, held_out: bool) -> Space:
    """A model's rows of Table A1, λ per objective; validated on the test set as in the paper, or on held-out images."""
    space = read_space("paper").with_fixed({"model": model, "valid_size": HELD_OUT if held_out else 0})
    values = space.model_dump()
    del values["fixed"]["weight"]
    values["overrides"] += [
        {"when": {"objective": objective}, "set": {"weight": weight}} for objective, weight in weights.items()
    ]
    return make_space(values, "space paper")


def large_table_space(weights: dict[str, float]) -> Space:
    """Table 2, at 112×112."""
    space = read_space("paper_112").model_dump()
    space["fixed"]["weight"] = weights["bcpl_l1"]
    return make_space(space, "space paper_112")


# Decoys --------------------------------------------------------------------------------------------------

CLEAN, TEN, SKETCHES, DECOYED = "clean", "ten", "sketches", "decoyed"
"""Prototypes of all clean training images, of ten of each class, drawn by hand, and of the decoyed images."""

DEPARTURE, SUPPORT = "bcpl_l1+30pdl", "bcpl_l1+100psl_margin"
"""Tried with other prototypes too: against where the data depart from them, and against where they are dark."""

DEPARTURES = ("pdl", DEPARTURE)
HEADLINE = ("baseline", "rrr", *DEPARTURES)
"""What gets its five seeds first."""

DECOY_WEIGHTS: dict[str, list[float]] = {
    "pdl": [3.0, 10.0, 1.0],
    DEPARTURE: [0.1, 0.03],
    SUPPORT: [0.1, 0.03, 0.01],
    "rrr": [10.0, 1.0, 3.0],
    "bcpl_l1": [10.0, 30.0],
    "psl": [1.0, 0.3],
    "psl_margin": [10.0, 3.0],
    "rrr_g": [10.0, 1000.0],
    "pl_l1": [30.0, 100.0],
}
"""λ of the first stage. RRR and RRR-G have a mask for every training image, the others ten prototypes."""

_DECOY_EPOCHS = 6  # twice those of the tables: what a network takes from the patch at first, it has to learn anew
# For the margin, by accuracy on validation images decoyed like the training set, seed 0. Digits end far from the
# corners, so little of the evidence need be outside; clothes reach into them. `psl` keeps that of its definition.
_DECOY_SUPPORT = {"decoy_mnist": 0.01, "decoy_fashion_mnist": 0.1}


def decoy_weights_space(prototypes: Path) -> Space:
    """Every objective against decoys along λ, one seed, prototypes of clean images."""
    points: list[Options] = [{"objective": "baseline"}]
    # One λ of each objective before the second of any: a table that is not finished says something of all.
    for weights in zip_longest(*DECOY_WEIGHTS.values()):
        pairs = zip(DECOY_WEIGHTS, weights, strict=True)
        points += [{"objective": objective, "weight": weight} for objective, weight in pairs if weight is not None]
    return _decoy_space(points, {"seed": DECOY_SEEDS[:1], "dataset": list(PLAIN)}, prototypes, CLEAN)


def decoy_seeds_space(prototypes: Path, chosen: Sequence[Chosen]) -> Space:
    """The other seeds at every λ that a rule chose."""
    return _decoy_space([_point(choice) for choice in chosen], {"seed": DECOY_SEEDS[1:]}, prototypes, CLEAN)


def decoy_prototypes_space(prototypes: Path, kind: str, chosen: Sequence[Chosen]) -> Space:
    """All seeds with another kind of prototypes, at the λ that was chosen with clean ones."""
    return _decoy_space([_point(choice) for choice in chosen], {"seed": DECOY_SEEDS}, prototypes, kind)


def decoy_float32_space(prototypes: Path, chosen: Sequence[Chosen]) -> Space:
    """All seeds with prototypes of clean images, in float32 whatever the recipe says."""
    return decoy_prototypes_space(prototypes, CLEAN, chosen).with_fixed({"precision": "no"})


def clean_space(chosen: Sequence[Chosen]) -> Space:
    """The same objectives on the clean data sets: what do they cost where nothing misleads?"""
    points = [{**_point(choice), "dataset": PLAIN[choice.dataset]} for choice in chosen]
    return _decoy_space(points, {"seed": DECOY_SEEDS}, Path(), DECOYED)


def _point(choice: Chosen) -> Options:
    point: Options = {"dataset": choice.dataset, "objective": choice.objective}
    return point if choice.objective == "baseline" else {**point, "weight": choice.weight}


def _decoy_space(points: list[Options], grid: dict[str, list[Any]], prototypes: Path, kind: str) -> Space:
    with_margin = [name for name in DECOY_WEIGHTS if "psl_margin" in name]
    by_dataset = [
        {"when": {"dataset": decoy}, "set": {"prototypes": os.path.abspath(prototypes / f"{plain}-{kind}")}}
        for decoy, plain in PLAIN.items()
    ]
    supports = [([decoy, PLAIN[decoy]], support) for decoy, support in _DECOY_SUPPORT.items()]
    return make_space(
        {
            "fixed": {**_recipe(), "valid_size": HELD_OUT, "epochs": _DECOY_EPOCHS},
            "grid": grid,
            "points": points,
            "overrides": [
                *(
                    {"when": {"dataset": names, "objective": with_margin}, "set": {"support": support}}
                    for names, support in supports
                ),
                *([] if kind == DECOYED else by_dataset),
            ],
        },
        "decoys",
    )
