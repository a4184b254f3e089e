"""What a sweep tries: options of a run along axes, read from a YAML file and checked before anything starts."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from distributed_batchcam.config import RunConfig, make_config
from distributed_batchcam.errors import InputError, unknown_name

Value = bool | int | float | str | list[Any] | None
Options = dict[str, Value]

# Options that the sweep itself gives to each trial.
_NOT_SWEPT = {"out", "resume", "debug", "group", "tags"}
_MOST_TRIALS = 100_000
_NAME_LENGTH = 120


class Draw(BaseModel):
    """An axis that is drawn from; exactly one of the fields is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    choice: Annotated[list[Value], Field(min_length=1)] | None = None
    """One of these."""
    uniform: tuple[float, float] | None = None
    """A number from low to high."""
    loguniform: tuple[float, float] | None = None
    """A number from low to high whose logarithm is uniform."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(kind is not None for kind in (self.choice, self.uniform, self.loguniform)) != 1:
            raise ValueError("takes one of choice, uniform, loguniform")
        low, high = self.loguniform or self.uniform or (0.0, 1.0)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"needs a lower and a higher number, got {low:g} and {high:g}")
        if self.loguniform and low <= 0:
            raise ValueError(f"loguniform needs numbers above 0, got {low:g}")
        return self

    def draw(self, random: np.random.Generator) -> Value:
        """A value of the axis."""
        if self.choice is not None:
            return self.choice[int(random.integers(len(self.choice)))]
        if self.loguniform is not None:
            low, high = map(math.log, self.loguniform)
            return math.exp(random.uniform(low, high))
        assert self.uniform is not None
        return float(random.uniform(*self.uniform))

    def extremes(self) -> list[Value]:
        """Values to check an axis by: all of a choice, both ends of a range."""
        return list(self.choice or self.uniform or self.loguniform or ())


class Override(BaseModel):
    """Options that hold where others have certain values: a recipe per model, a weight per objective."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    when: Annotated[dict[str, Value], Field(min_length=1)]
    """Option: value, or a list of values any of which will do."""
    set: Annotated[Options, Field(min_length=1)]
    """Option: value."""

    def holds(self, options: Mapping[str, Value]) -> bool:
        """Whether all conditions are met."""
        return all(
            options.get(name, RunConfig.model_fields[name].default)
            in (wanted if isinstance(wanted, list) else [wanted])
            for name, wanted in self.when.items()
        )


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    axes: Options
    """Its place on the axes of the space."""
    options: Options
    """All options of the run, those of the axes among them."""

    @cached_property
    def id(self) -> str:
        """Eight hexadecimal digits that stand for the options: the same in every sweep of the same space."""
        canonical = json.dumps(self.options, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """Name of the run directory: the place on the axes for people, the id for certainty."""
        place = ",".join(f"{name}={_in_a_name(value)}" for name, value in self.axes.items())
        return f"{place[:_NAME_LENGTH] or 'trial'},{self.id}"

    def config(self, **further: Any) -> RunConfig:
        """The configuration of the run.

        Raises:
            InputError: options that do not go together.
        """
        try:
            return make_config({**self.options, **further})
        except InputError as error:
            raise InputError(f"trial {self.name}: {error}") from None


def _items(value: Any) -> Any:
    return {} if value is None else value


class Space(BaseModel):
    """Fixed options, axes that are gone through in full (grid), points of several axes, axes that are drawn from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fixed: Annotated[Options, BeforeValidator(_items)] = {}
    grid: Annotated[dict[str, Annotated[list[Value], Field(min_length=1)]], BeforeValidator(_items)] = {}
    points: list[Options] = []
    """Values of several axes that belong together, each point with the whole grid."""
    sample: Annotated[dict[str, Draw], BeforeValidator(_items)] = {}
    overrides: list[Override] = []

    @model_validator(mode="after")
    def _known_options_each_in_one_place(self) -> Self:
        axes = self.axes
        named = [*self.fixed, *axes, *(name for rule in self.overrides for name in (*rule.when, *rule.set))]
        for name in named:
            if name in _NOT_SWEPT:
                raise InputError(f"{name} is not for a space: the sweep gives each trial its own")
            if name not in RunConfig.model_fields:
                raise unknown_name(
                    "option", name, RunConfig.model_fields.keys() - _NOT_SWEPT, "see batchcam train --help"
                )
        places = [*self.fixed, *axes]
        for name in places:
            if places.count(name) > 1:
                raise InputError(f"{name} stands in two of fixed, grid, points and sample: leave it in one")
        for rule in self.overrides:
            for name in rule.set.keys() & set(axes):
                raise InputError(f"an override sets {name}, which is an axis: leave it in one place")
        return self

    @property
    def axes(self) -> list[str]:
        """Names of the options that differ between trials."""
        return [*self.grid, *dict.fromkeys(name for point in self.points for name in point), *self.sample]

    def with_fixed(self, options: Options) -> "Space":
        """The space with some options held fast, whatever it says of them."""
        left = {
            "fixed": {**self.fixed, **options},
            "grid": {name: values for name, values in self.grid.items() if name not in options},
            "points": [{name: value for name, value in point.items() if name not in options} for point in self.points],
            "sample": {name: draw for name, draw in self.sample.items() if name not in options},
            "overrides": [
                {"when": rule.when, "set": kept}
                for rule in self.overrides
                if (kept := {name: value for name, value in rule.set.items() if name not in options})
            ],
        }
        return make_space(left, "--set")

    def with_texts(self, names: Collection[str], change: Callable[[str], str]) -> "Space":
        """The space with the texts of some options changed, wherever they stand."""

        def changed(value: Any) -> Any:
            if isinstance(value, list):
                return [changed(one) for one in value]
            return change(value) if isinstance(value, str) else value

        def of(options: Mapping[str, Any]) -> dict[str, Any]:
            return {name: changed(value) if name in names else value for name, value in options.items()}

        values = self.model_dump(exclude_none=True)
        values |= {"fixed": of(self.fixed), "grid": of(self.grid), "points": [of(point) for point in self.points]}
        values["overrides"] = [{"when": of(rule.when), "set": of(rule.set)} for rule in self.overrides]
        for name in values["sample"].keys() & set(names):
            values["sample"][name] = {kind: changed(drawn) for kind, drawn in values["sample"][name].items()}
        return make_space(values, "space")

    def only(self, trials: Iterable[Trial]) -> "Space":
        """The space of some of its trials, by their names and options the same."""
        return self.model_copy(update={"grid": {}, "sample": {}, "points": [trial.axes for trial in trials]})

    def all_drawn(self) -> "Space":
        """The space with its grid drawn from, too.

        Raises:
            InputError: points, whose values cannot be drawn one by one.
        """
        if self.points:
            raise InputError("points cannot be drawn from, their values belong together: make them a grid or a sample")
        choices = {name: Draw(choice=values) for name, values in self.grid.items()}
        return self.model_copy(update={"grid": {}, "sample": {**choices, **self.sample}})

    def trial(self, axes: Mapping[str, Value]) -> Trial:
        """The trial at a place on the axes; later overrides go before earlier ones."""
        options = {**self.fixed, **axes}
        for rule in self.overrides:
            if rule.holds(options):
                options |= rule.set
        place = dict(axes)
        if options.get("objective") == "baseline":
            # λ weighs a loss that a baseline does not have: its trials along λ are one and the same.
            options.pop("weight", None)
            place.pop("weight", None)
        return Trial(place, options)

    def trials(self, samples: int = 1, seed: int = 0) -> list[Trial]:
        """The whole grid; where the space has axes to draw from, with `samples` draws at each of its points.

        Raises:
            InputError: a trial whose options do not go together, or far too many trials.
        """
        count = math.prod(len(values) for values in self.grid.values()) * max(1, len(self.points))
        count *= samples if self.sample else 1
        if count > _MOST_TRIALS:
            raise InputError(f"the space holds {count:,} trials, more than {_MOST_TRIALS:,}: thin it out")
        found: dict[str, Trial] = {}
        for axes in self._places(samples, np.random.default_rng(seed)):
            trial = self.trial(axes)
            trial.config()
            found.setdefault(trial.id, trial)
        return list(found.values())

    def check(self) -> None:
        """Require options that go together at every point of the grid and at the ends of what is drawn from.

        Raises:
            InputError: the first trial that cannot be.
        """
        ends = {name: draw.extremes() for name, draw in self.sample.items()}
        self.model_copy(update={"grid": {**self.grid, **ends}, "sample": {}}).trials()

    def _places(self, samples: int, random: np.random.Generator) -> Iterator[Options]:
        for point, values in itertools.product(self.points or [{}], itertools.product(*self.grid.values())):
            place = point | dict(zip(self.grid, values, strict=True))
            if not self.sample:
                yield place
            else:
                for _ in range(samples):
                    yield place | {name: draw.draw(random) for name, draw in self.sample.items()}


def built_in_spaces() -> list[str]:
    """Names of the spaces that come with the project."""
    return sorted(entry.name.removesuffix(".yaml") for entry in files("tune").joinpath("spaces").iterdir())


def read_space(name_or_file: str) -> Space:
    """A space of the project's by name, or anybody's from a YAML file.

    Raises:
        InputError: no such space, or one line about what is wrong in it.
    """
    if name_or_file in built_in_spaces():
        text = files("tune").joinpath("spaces", f"{name_or_file}.yaml").read_text(encoding="utf-8")
    elif name_or_file.endswith((".yaml", ".yml")):
        try:
            text = Path(name_or_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read space {name_or_file}: {getattr(error, 'strerror', None) or error}") from None
    else:
        raise unknown_name("space", name_or_file, built_in_spaces(), "or a file: NAME.yaml")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise InputError(f"space {name_or_file} is not plain YAML{line}") from None
    return make_space(values, f"space {name_or_file}")


def make_space(values: Any, source: str) -> Space:
    """A space from plain data.

    Raises:
        InputError: one line that names `source`, the place and what is wrong.
    """
    if not isinstance(values, dict):
        raise InputError(f"{source} must hold fixed, grid, points, sample or overrides, not a {type(values).__name__}")
    try:
        return Space.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise unknown_name(f"entry of {source}", place, Space.model_fields) from None
        reason = str(cause or first["msg"])
        raise InputError(f"{source}: {place + ': ' if place else ''}{reason}") from None


def parse_value(text: str) -> Value:
    """A value as YAML reads it: 3, 0.1, yes, bcpl_l1; numbers like 1e-3, which YAML takes for text, too."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value if isinstance(value, bool | int | float | list | None) else text


def _in_a_name(value: Value) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)
