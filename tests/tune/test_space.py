"""Spaces: what they expand to, and what is said of a bad one."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_batchcam.errors import InputError
from distributed_batchcam.report.paper import Setting, paper_accuracy
from tune.space import Space, built_in_spaces, make_space, parse_value, read_space


def test_a_grid_has_each_combination_once() -> None:
    space = Space(fixed={"epochs": 2}, grid={"objective": ["pl_l1", "bcpl_l1"], "seed": [0, 1, 2]})
    trials = space.trials()
    assert [tuple(trial.axes.values()) for trial in trials] == list(itertools.product(["pl_l1", "bcpl_l1"], [0, 1, 2]))
    assert all(trial.options == {"epochs": 2, **trial.axes} for trial in trials)
    assert len({trial.name for trial in trials}) == len({trial.id for trial in trials}) == 6


def test_each_point_goes_with_the_whole_grid() -> None:
    points = [{"objective": "pl_l1", "weight": 1.0}, {"objective": "psl", "weight": 3.0}, {"objective": "baseline"}]
    trials = Space(grid={"seed": [0, 1]}, points=points).trials()
    assert [trial.axes for trial in trials] == [{**point, "seed": seed} for point in points for seed in (0, 1)]


def test_an_option_held_fast_leaves_the_points() -> None:
    space = Space(points=[{"objective": "psl", "weight": 1.0}, {"objective": "psl", "weight": 3.0}, {"weight": 0.1}])
    fast = space.with_fixed({"weight": 2.0})
    assert [trial.options for trial in fast.trials()] == [{"weight": 2.0, "objective": "psl"}, {"weight": 2.0}]
    with pytest.raises(InputError, match="points cannot be drawn from"):
        space.all_drawn()


def test_some_trials_of_a_space_are_the_same_by_themselves() -> None:
    space = Space(
        fixed={"epochs": 2, "target_layer": None},
        grid={"objective": ["baseline", "psl"], "seed": [0, 1]},
        sample={"weight": {"uniform": [1, 2]}},
        overrides=[{"when": {"objective": "psl"}, "set": {"support": 0.1}}],
    )
    trials = space.trials()
    some = [trials[0], trials[3]]
    assert space.only(some).trials() == some
    assert [trial.name for trial in space.only(some).trials()] == [trial.name for trial in some]


def test_texts_are_changed_wherever_they_stand() -> None:
    space = Space(
        fixed={"masks": "a", "dataset": "mnist", "pretrained": True},
        grid={"prototypes": ["a", "b"]},
        points=[{"data_root": "c", "seed": 1}],
        sample={"weight": {"uniform": [1, 2]}},
        overrides=[{"when": {"prototypes": ["a"]}, "set": {"target_layer": "a"}}],
    )
    changed = space.with_texts(("masks", "prototypes", "data_root", "pretrained"), str.upper)
    assert changed.fixed == {"masks": "A", "dataset": "mnist", "pretrained": True}
    assert changed.grid == {"prototypes": ["A", "B"]}
    assert changed.points == [{"data_root": "C", "seed": 1}]
    assert changed.sample == space.sample
    assert (changed.overrides[0].when, changed.overrides[0].set) == ({"prototypes": ["A"]}, {"target_layer": "a"})
    drawn = Space(sample={"prototypes": {"choice": ["a", "b"]}}).with_texts(["prototypes"], str.upper)
    assert drawn.sample["prototypes"].choice == ["A", "B"]


def test_a_baseline_runs_once_whatever_the_weights() -> None:
    trials = Space(grid={"objective": ["baseline", "pl_l1"], "weight": [0.1, 1.0], "seed": [0, 1]}).trials()
    assert [tuple(trial.axes.values()) for trial in trials] == [
        *(("baseline", 0), ("baseline", 1)),
        *(("pl_l1", 0.1, 0), ("pl_l1", 0.1, 1), ("pl_l1", 1.0, 0), ("pl_l1", 1.0, 1)),
    ]


def test_overrides_apply_where_their_conditions_hold_and_later_ones_go_first() -> None:
    space = Space(
        grid={"model": ["simple_cnn", "resnet18"], "objective": ["pl_l1", "bcpl_l1"]},
        overrides=[
            {"when": {"model": ["resnet18", "convnextv2_tiny"]}, "set": {"lr": 0.01, "epochs": 5}},
            {"when": {"model": "resnet18", "objective": "bcpl_l1"}, "set": {"lr": 0.02}},
            {"when": {"schedule": "onecycle"}, "set": {"warmup": 0.3}},  # a default counts, too
        ],
    )
    found = {tuple(trial.axes.values()): trial.config() for trial in space.trials()}
    assert found["simple_cnn", "pl_l1"].lr == 2e-3
    assert (found["resnet18", "pl_l1"].lr, found["resnet18", "pl_l1"].epochs) == (0.01, 5)
    assert (found["resnet18", "bcpl_l1"].lr, found["resnet18", "bcpl_l1"].epochs) == (0.02, 5)
    assert all(config.warmup == 0.3 for config in found.values())


def test_draws_follow_their_distribution_and_the_seed_alone() -> None:
    space = Space(
        grid={"seed": [0, 1]},
        sample={
            "weight": {"loguniform": [1e-3, 10]},
            "label_smoothing": {"uniform": [0, 0.2]},
            "optimizer": {"choice": ["adamw", "sgd"]},
        },
    )
    trials = space.trials(500, seed=3)
    assert len(trials) == 1000
    weights = np.array([trial.axes["weight"] for trial in trials], dtype=float)
    smoothing = np.array([trial.axes["label_smoothing"] for trial in trials], dtype=float)
    assert weights.min() >= 1e-3
    assert weights.max() <= 10
    # Quartiles of a uniform logarithm; 1,000 draws scatter by about 0.015 of the range.
    quartiles = (np.quantile(np.log(weights), [0.25, 0.5, 0.75]) - math.log(1e-3)) / (math.log(10) - math.log(1e-3))
    assert quartiles == pytest.approx([0.25, 0.5, 0.75], abs=0.06)
    assert np.quantile(smoothing, [0.25, 0.5, 0.75]) == pytest.approx([0.05, 0.1, 0.15], abs=0.012)
    assert {trial.axes["optimizer"] for trial in trials} == {"adamw", "sgd"}
    assert space.trials(500, seed=3) == trials
    assert space.trials(500, seed=4) != trials


def test_a_trial_is_known_by_its_options_wherever_they_stand() -> None:
    one = Space(fixed={"epochs": 2, "lr": 0.1}, grid={"seed": [0]}).trials()[0]
    other = Space(fixed={"lr": 0.1}, grid={"seed": [0], "epochs": [2]}).trials()[0]
    assert one.id == other.id
    assert one.id != Space(fixed={"epochs": 3, "lr": 0.1}, grid={"seed": [0]}).trials()[0].id


def test_names_are_safe_as_file_names_and_tell_the_axes() -> None:
    axes = {
        "model": "convnext_base.fb_in22k",
        "prototypes": "../my <b>masks</b>/ü",
        "weight": 0.1,
        "target_layer": None,
    }
    (trial,) = Space(grid={name: [value] for name, value in axes.items()}).trials()
    assert trial.name == (
        f"model=convnext_base.fb_in22k,prototypes=..-my-b-masks-b-,weight=0.1,target_layer=None,{trial.id}"
    )
    assert len(Space(grid={"prototypes": ["x" * 300]}).trials()[0].name) < 200


def test_options_that_are_held_fast_leave_the_axes() -> None:
    space = Space(
        fixed={"epochs": 5},
        grid={"seed": [0, 1], "dataset": ["mnist", "digits"]},
        overrides=[{"when": {"dataset": "mnist"}, "set": {"lr": 0.1}}],
    ).with_fixed({"dataset": "mnist", "epochs": 1, "lr": 0.2})
    assert space.axes == ["seed"]
    assert {(t.config().dataset, t.config().epochs, t.config().lr) for t in space.trials()} == {("mnist", 1, 0.2)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "must hold fixed, grid, points, sample or overrides, not a list"),
        ({"girds": {}}, "unknown entry of space here 'girds'; did you mean grid?"),
        ({"fixed": {"epcohs": 1}}, "unknown option 'epcohs'; did you mean epochs?"),
        ({"grid": {"out": ["a"]}}, "out is not for a space: the sweep gives each trial its own"),
        ({"grid": {"seed": []}}, "grid.seed: List should have at least 1 item"),
        ({"grid": {"seed": 3}}, "grid.seed: Input should be a valid list"),
        ({"fixed": {"seed": 1}, "grid": {"seed": [1]}}, "seed stands in two of fixed, grid, points and sample"),
        ({"sample": {"lr": {"uniform": [2, 1]}}}, "sample.lr: needs a lower and a higher number, got 2 and 1"),
        ({"sample": {"lr": {"loguniform": [0, 1]}}}, "sample.lr: loguniform needs numbers above 0"),
        ({"sample": {"lr": {"normal": [0, 1]}}}, "unknown entry of space here 'sample.lr.normal'"),
        ({"sample": {"lr": {}}}, "sample.lr: takes one of choice, uniform, loguniform"),
        ({"sample": {"lr": {"uniform": [0, 1], "choice": [1]}}}, "takes one of choice, uniform, loguniform"),
        ({"overrides": [{"when": {}, "set": {"lr": 1}}]}, "overrides.0.when"),
        ({"overrides": [{"when": {"model": "a"}, "set": {"lrr": 1}}]}, "unknown option 'lrr'; did you mean lr"),
        (
            {"grid": {"lr": [1, 2]}, "overrides": [{"when": {"model": "a"}, "set": {"lr": 1}}]},
            "an override sets lr, which is an axis",
        ),
    ],
)
def test_a_bad_space_is_one_line_that_names_the_place(values: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_space(values, "space here")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"grid": {"objective": ["pl_l1", "pl_l3"]}},
            "objective=pl_l3,.*unknown objective 'pl_l3'; did you mean pl_l",
        ),
        ({"grid": {"batch_size": [64, 63]}, "fixed": {"accumulate": 2}}, "batch_size=63,.*cannot be cut"),
        ({"grid": {"lr": [0.1, -1]}}, "lr=-1,.*--lr -1: input should be greater than 0"),
        ({"grid": {"seed": list(range(1000)), "epochs": list(range(1, 1000))}}, "999,000 trials, more than 100,000"),
    ],
)
def test_options_that_do_not_go_together_are_found_before_anything_starts(space: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Space(**space).trials()


def test_the_ends_of_a_range_are_checked() -> None:
    with pytest.raises(InputError, match="--label-smoothing 1"):
        Space(sample={"label_smoothing": {"uniform": [0, 1]}}).check()
    Space(sample={"label_smoothing": {"uniform": [0, 0.5]}}).check()


@pytest.mark.parametrize("name", built_in_spaces())
def test_the_spaces_of_the_project_are_sound(name: str) -> None:
    assert len(read_space(name).trials()) > 1


def test_the_paper_spaces_are_the_tables_of_the_paper() -> None:
    for name, rows in (("paper", 42), ("paper_112", 4)):
        settings = {
            Setting(config.model, config.dataset, config.objective, config.image_size or 0)
            for config in (trial.config() for trial in read_space(name).trials())
        }
        assert len(settings) == rows
        assert all(paper_accuracy(setting) is not None for setting in settings)
        # One recipe per model, not one per row.
        ignored = {"dataset", "objective", "seed"}
        recipes = {
            (trial.options["model"], *sorted((k, v) for k, v in trial.options.items() if k not in ignored | {"model"}))
            for trial in read_space(name).with_fixed({"weight": 0.1}).trials()
            if trial.options["objective"] != "baseline"
        }
        assert len(recipes) == len({recipe[0] for recipe in recipes})


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("fixed:\n  dataset: digits\ngrid:\n  seed: [0, 1]\n")
    assert len(read_space(str(file)).trials()) == 2
    file.write_text("grid: [\n")
    with pytest.raises(InputError, match=r"mine\.yaml is not plain YAML in line"):
        read_space(str(file))
    with pytest.raises(InputError, match="unknown space 'papr'; did you mean paper"):
        read_space("papr")
    file.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="is not plain YAML"):
        read_space(str(file))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.1", 0.1),
        ("1e-3", 1e-3),
        ("true", True),
        ("bcpl_l1", "bcpl_l1"),
        ("[1, 2]", [1, 2]),
        ("a: b", "a: b"),
    ],
)
def test_values_on_the_command_line_are_read_as_in_a_file(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)
