"""docs/results.md, written from docs/results/*.json and the paper's own figures alone: every number has a run."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from distributed_batchcam.checkpoint import write_atomic
from distributed_batchcam.models import PAPER_MODELS
from distributed_batchcam.report.paper import Setting, paper_table

from .collect import read_runs
from .stages import DECOY_SEEDS, DECOYED, DEPARTURES, SKETCHES, SUPPORT, TEN
from .weights import RULES, Chosen, decoy_weights, table_weights

Run = Mapping[str, Any]
NOT_RUN = "not run"
EXPLANATIONS = {
    "class_cam_ssim": "class SSIM",
    "relevance_mass": "relevance mass ↑",
    "random_logit_ssim": "random-logit SSIM ↓",
    "insertion_auc": "insertion AUC ↑",
    "deletion_auc": "deletion AUC ↓",
    "sensitivity": "sensitivity ↓",
}
GOALS = {"decoy_mnist": 98.8, "decoy_fashion_mnist": 90.0}
GOALS_TEN = {"decoy_mnist": 98.0, "decoy_fashion_mnist": 88.5}


class Figure(NamedTuple):
    """Mean and standard deviation over runs."""

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Figure | None":
        """None where there is no value."""
        found = [value for value in values if value is not None]
        if not found:
            return None
        return cls(mean(found), stdev(found) if len(found) > 1 else 0.0, len(found))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(self.n)

    def text(self, decimals: int = 2) -> str:
        spread = f" ± {self.deviation:.{decimals}f}" if self.n > 1 else ""
        return f"{self.mean:.{decimals}f}{spread} ({self.n})"


def write_page(results: Path) -> Path:
    """Write docs/results.md beside docs/results; returns its path."""
    page = results.parent / "results.md"
    parts = [_INTRODUCTION, *_tables(results), *_decoys(results)]
    write_atomic(page, ("\n\n".join(part.strip() for part in parts) + "\n").encode())
    return page


_INTRODUCTION = """
# Results

`make reproduce` runs everything on this page that the machine can (`make reproduce-cpu` the SimpleCNN rows alone), goes
on where it was stopped, and writes the page from [docs/results](results), where each run stands with its
summary, configuration and versions until it is made anew. `python -m benchmarks.reproduce --missing` makes only those
that do not stand there, such as what the last machine could not.

Accuracies are in percent, mean ± standard deviation (number of seeds).
"""


# The paper's tables --------------------------------------------------------------------------------------


def _tables(results: Path) -> list[str]:
    first, second = (
        [run for model in PAPER_MODELS for run in read_runs(results, f"{table}-{model}")]
        for table in ("table_a1", "table_a1_held_out")
    )
    weights, large = read_runs(results, "weights"), read_runs(results, "table_2")
    parts = ["## The paper's tables\n" + _RECIPE]
    if weights:
        chosen = table_weights(weights)
        tried = sorted({float(run["weight"]) for run in weights if run["objective"] != "baseline"})
        parts.append(
            "λ is chosen in the space [lambda](../tune/spaces/lambda.yaml), by this recipe, on Fashion-MNIST with "
            "`simple_cnn`, 5,000 training images held out, one seed: the largest of "
            + ", ".join(f"{weight:g}" for weight in tried)
            + " whose validation accuracy is within one standard error of the objective's best, √(p·(1 - p)/5,000) or "
            "about 0.4 points. It serves both data sets and all models: "
            + ", ".join(f"`{name}` {weight:g}" for name, weight in chosen.items())
            + "."
        )
        if older := {r["objective"] for r in (*first, *second, *large) if _weight(r) != chosen.get(r["objective"], 0)}:
            parts.append(f"Run at a λ of an earlier choice: {', '.join(f'`{name}`' for name in sorted(older))}.")
    parts.append(_in_float32([*first, *second, *large]))
    parts.append(_accuracies([*first, *large], [*second]))
    parts.append(_verdict(first, second))
    parts.append(_explanations(results, second or first))
    parts += _claims(first, second)
    if weights:
        parts.append(
            "### Accuracy against explanations\n\n![Validation accuracy against class SSIM](results/pareto.png)\n\n"
            + _front(weights)
        )
    return [part for part in parts if part]


_RECIPE = """
One recipe per model, the same in every row ([tune/spaces/paper.yaml](../tune/spaces/paper.yaml)), no augmentation.
Protocol one is the paper's: all training images, and the best test accuracy over the epochs, which is a choice made by
the test set. Protocol two is the honest one: 5,000 training images held out, the epoch chosen on them, and the
test accuracy of that epoch.
"""


def _accuracies(first: Sequence[Run], second: Sequence[Run]) -> str:
    rows = []
    one, two = _by_setting(first), _by_setting(second)
    for setting, paper in sorted(paper_table().items(), key=lambda row: PAPER_MODELS.index(row[0].model)):
        ours = Figure.of(run["best_valid_accuracy"] for run in one[setting])
        honest = Figure.of(run["best_test_accuracy"] for run in two[setting])
        reached = "" if ours is None else ("yes" if ours.mean >= paper else f"{ours.mean - paper:+.2f}")
        weights = sorted({_weight(run) for run in (*one[setting], *two[setting])} - {0.0})
        rows.append(
            [
                *(f"`{setting.model}`", f"{setting.dataset}", f"`{setting.objective}`"),
                *(", ".join(f"{weight:g}" for weight in weights), str(setting.image_size)),
                *(f"{paper:.2f}", _text(ours), reached, _text(honest)),
            ]
        )
    head = ["model", "data set", "objective", "λ", "pixels", "paper", "protocol one", "at or above", "protocol two"]
    return _markdown(head, rows)


def _verdict(first: Sequence[Run], second: Sequence[Run]) -> str:
    one, two = _by_setting(first), _by_setting(second)
    lines = []
    for model in PAPER_MODELS:
        settings = {s: paper for s, paper in paper_table().items() if s.model == model and s.image_size == 28}
        ours = {s: Figure.of(run["best_valid_accuracy"] for run in one[s]) for s in settings}
        honest = {s: Figure.of(run["best_test_accuracy"] for run in two[s]) for s in settings}
        ran = [s for s in settings if ours[s]]
        at = sum(1 for s in ran if (figure := ours[s]) and figure.mean >= settings[s])
        within = sum(1 for s in settings if (figure := honest[s]) and figure.mean >= settings[s] - 0.1)
        held = sum(1 for s in settings if honest[s])
        lines.append(
            f"`{model}`: {len(ran)} of {len(settings)} rows run under protocol one, {at} at or above the paper; "
            f"{held} under protocol two, {within} no more than 0.1 below it."
        )
    return "\n".join(f"* {line}" for line in lines)


_LOOKING = """
Class SSIM is what the objectives optimise, so it is no independent evidence; the others are: relevance mass inside the
foreground, likeness to the map of another class, insertion, deletion and sensitivity to noise (on 500 images, first
seed). The arrows say what is better. Test set, last epoch.
""".strip()


def _explanations(results: Path, runs: Sequence[Run]) -> str:
    if not runs:
        return ""
    rows = []
    for (model, dataset, objective), group in _grouped(runs, "model", "dataset", "objective").items():
        figures = (Figure.of(run.get(name) for run in group) for name in EXPLANATIONS)
        rows.append([f"`{model}`", dataset, f"`{objective}`", *(_text(figure, 3) for figure in figures)])
    return (
        "### What the models look at\n\n"
        + _LOOKING
        + "\n\n"
        + _markdown(["model", "data set", "objective", *EXPLANATIONS.values()], rows)
        + "\n\n"
        + _pictures(results, "mnist", "fashion_mnist")
    )


def _claims(first: Sequence[Run], second: Sequence[Run]) -> list[str]:
    """Whether objectives differ from the baseline by more than seeds do."""
    lines, raised = [], set()
    for name, runs, accuracy in (
        ("protocol one", first, "best_valid_accuracy"),
        ("protocol two", second, "best_test_accuracy"),
    ):
        for (model, dataset), group in _grouped(runs, "model", "dataset").items():
            by_objective = {
                key: Figure.of(r[accuracy] for r in g) for (key,), g in _grouped(group, "objective").items()
            }
            base = by_objective.pop("baseline", None)
            if base is None or base.n < 2 or not by_objective:
                continue
            ranked = sorted(by_objective.items(), key=lambda item: -item[1].mean if item[1] else 0)
            told = []
            for key, figure in ranked:
                if figure is not None:
                    difference = figure.mean - base.mean
                    sure = figure.n > 1 and abs(difference) > 3 * math.hypot(figure.error, base.error)
                    mark = "**" if sure else ""
                    told.append(f"`{key}` {mark}{round(difference, 2) + 0.0:+.2f}{mark}")
                    if sure and difference > 0:
                        raised.add(key)
            lines.append(
                f"* `{model}`, {dataset}, {name}, differences from the baseline's {base.text()}: {', '.join(told)}."
            )
    if not lines:
        return []
    return [
        "### Does a loss on explanations raise the accuracy?\n\nThe paper's tables rank the objectives by accuracy. "
        "Here, over seeds:\n\n"
        + "\n".join(lines)
        + "\n\nBold: more than three standard errors; the rest is not told apart from chance by so few seeds. λ is as "
        "large as validation lets it be, which may cost some tenths of a point. "
        + (
            f"Accuracy rises with {', '.join(f'`{key}`' for key in sorted(raised))}."
            if raised
            else "No accuracy rises: what the losses change beyond doubt is the maps."
        )
    ]


def _front(runs: Sequence[Run]) -> str:
    def beaten(run: Run) -> bool:
        return any(
            other["best_valid_accuracy"] >= run["best_valid_accuracy"]
            and other["class_cam_ssim"] >= run["class_cam_ssim"]
            and other is not run
            for other in runs
        )

    front = sorted((run for run in runs if not beaten(run)), key=lambda run: float(run["class_cam_ssim"]))
    told = ", ".join(
        f"`{run['objective']}` at {run['weight']:g} ({run['best_valid_accuracy']:.2f} %, {run['class_cam_ssim']:.2f})"
        for run in front
    )
    return f"The Pareto front (accuracy, class SSIM), one seed, `simple_cnn` on Fashion-MNIST: {told}."


def _by_setting(runs: Iterable[Run]) -> defaultdict[Setting, list[Run]]:
    found: defaultdict[Setting, list[Run]] = defaultdict(list)
    for run in runs:
        found[Setting(run["model"], run["dataset"], run["objective"], run["image_size"])].append(run)
    return found


# Decoys --------------------------------------------------------------------------------------------------


def _decoys(results: Path) -> list[str]:
    along = read_runs(results, "decoy_weights")
    if not along:
        return [
            "## Right for the right reasons\n\nThe decoy benchmark was " + NOT_RUN + " yet.",
            *_exploration(results),
        ]
    runs = [run for stage in ("weights", "seeds", "other_seeds") for run in read_runs(results, f"decoy_{stage}")]
    parts = ["## Right for the right reasons\n" + _DECOYS]
    parts.append("### λ, one seed\n\n" + _decoy_table(along, by_weight=True))
    for rule, chosen in decoy_weights(along).items():
        keys = {(choice.dataset, choice.objective, choice.weight) for choice in chosen}
        selected = [run for run in runs if (run["dataset"], run["objective"], _weight(run)) in keys]
        parts.append(
            f"### λ chosen by {rule}\n\n{_first_line(RULES[rule])}\n\n" + _decoy_table(selected, by_weight=True)
        )
    others = [run for kind in (TEN, SKETCHES, DECOYED) for run in read_runs(results, f"decoy_{kind}")]
    if others:
        parts.append("### Other prototypes\n\n" + _PROTOTYPES + "\n\n" + _decoy_table(others, by_prototypes=True))
    clean = read_runs(results, "decoy_clean")
    if clean:
        rows = [
            [dataset, f"`{objective}`", _text(Figure.of(run["test_accuracy"] for run in group))]
            for (dataset, objective), group in _grouped(clean, "dataset", "objective").items()
        ]
        parts.append(
            "### What it costs where nothing misleads\n\n" + _CLEAN + _markdown(["data set", "objective", "test"], rows)
        )
    parts.append(_goals(along, runs, others))
    parts.append(_precisions(runs, [*others, *clean], read_runs(results, "decoy_float32")))
    parts.append("### What the models look at on decoys\n\n" + _pictures(results, "decoy_mnist", "decoy_fashion_mnist"))
    return [*(part for part in parts if part), _ADVICE, *_exploration(results)]


_DECOYS = """
A 4×4 patch in a corner drawn at random has the value 255 - 25·y in training images of class y, and says nothing in the
test images (Ross et al. 2017; the XIL typology, Friedrich et al. 2023). A model that trusts it fails the test. `rrr`
and `rrr_g` are told the patch of each of the 55,000 training images by a mask; the published RRR-G takes α for a
constant, ours differentiates it. The others see no mask: only ten prototypes, one per class, here the averages of
clean training images. `pdl` finds the patches' places by what the decoyed images are on the average and the prototypes
are not; `psl` forbids where the prototypes are dark; `bcpl_l1+30pdl` at 0.1 is `bcpl_l1` at the tables' λ and `pdl` at
3, at 0.03 nearly `pdl` at 1. `simple_cnn`, the recipe of the tables but for six epochs, 5,000 decoyed training images
held out; the support of the margin is 0.01 for digits and 0.1 for clothes, whose averages reach into the corners, that
of `psl` is 0.05; "decoyed test" is the accuracy that counts, "validation" is on images decoyed like the training set,
which is all that most people have. Patch mass is the share of the predicted class's Grad-CAM on the patch, WR the
typology's thresholded score: the share of a patch's pixels above the mean of all maps (percent; constant maps have
none, and are counted). Published figures, under protocols that differ (networks, epochs, patches of one corner or
several): unpenalised 52 to 79 on decoy MNIST and 58 on decoy Fashion-MNIST, with a mask per image 96 to 99 and 77 to
89.
"""

_PROTOTYPES = """
All seeds, λ as with clean prototypes. `ten`: averages of ten clean images of each class. `sketches`: drawn by a script
([sketches.py](../benchmarks/reproduce/sketches.py)), without any image. `decoyed`: averages of the decoyed training
images, which contain the patches and so excuse them: the trap that waits for whoever has no clean image at all. From
those nothing departs, and `pdl` says so and refuses; drawings depart everywhere a little, which is no use to it.
"""


_ADVICE = """
### When to use which

* Nothing is suspected, and the maps should lie on the object: `bcpl_l1` at 0.1. It costs nothing that can be
  measured, and the maps are better by every independent figure but one (the table further up).
* A cue is suspected, nobody knows where, and there are ten clean images of each class, taken like the others:
  `pdl` at 1, or `bcpl_l1+30pdl` at 0.03 for maps that lie on the object besides. They differentiate the whole network
  twice, as `rrr` does. The cue must keep to a few places and concern most classes; the object may reach there too.
* A cue is suspected where the object is not, and somebody can draw: the support loss, best together with `bcpl_l1`.
  Choose the support as low as still leaves the suspected places outside: what is outside is lost as evidence, the true
  as well as the false.
* A cue moves about: `rrr`, which needs a mask for every image.
* `bcpl_*`, `pl_*` and `rrr_g` by themselves help a little, and are not enough. They ask something of the map of one
  class, and the maps obey: little of their mass is left on the patch. The predictions still follow it, as it goes on
  speaking for and against the other classes. A map that looks right is no proof of a right reason: the test is to
  change the cue.
* There are only images with the cue: nothing here helps, as the prototypes hold the cue too. Where nothing departs from
  the prototypes, `pdl` refuses to train: on clean data it costs nothing because there is nothing for it to do.
""".strip()


_CLEAN = """
Clean data, prototypes of the data set's own images, λ as on decoys. Clothes reach into the corners, which the support
loss takes from the network. `pdl` finds nothing that departs, and refuses; what `bcpl_l1` costs is in the tables
further up.

""".lstrip()

_EXPLORATION = """
### What was tried on the way

Decoy Fashion-MNIST, one seed, prototypes of clean images, in a session before the code was what it is: figures to
choose by, not to quote. "Evidence" is what the support loss asks to be nought outside the support: the gradient of
Σ log p has no slope at the start and a large one where the network is certain, the margin's is gentler. A wider
outside (a higher support) costs more of the true evidence than it takes from the patch, as bags, boots and coats
reach into the corners. The sum with `bcpl_l1` and more epochs is what goes furthest; at an earlier layer the loss
leaves the patch its influence. Schedules of λ and a support that fades, tried last (on the code as it is), gain
nothing: without them the sum at 0.03 has 90.21, and `pdl` 92.10. In the four corners alone, which is where the data
depart from the prototypes, a loss at the input costs little of the true evidence, and least where it is weighted with
the departure of each image: that became `pdl`.
"""


def _exploration(results: Path) -> list[str]:
    runs = read_runs(results, "decoy_exploration")
    if not runs:
        return []
    rows = [
        [
            *(f"`{run['objective']}`", f"{run['weight']:g}", run["evidence"], f"{run['config']['support']:g}"),
            *(str(run["epochs"]), f"{run['test_accuracy']:.2f}", f"{run['valid_accuracy']:.2f}"),
            *(f"{run['clean_test_accuracy']:.2f}", f"{run['class_cam_ssim']:.2f}"),
        ]
        for run in runs
    ]
    head = ["objective", "λ", "evidence", "support", "epochs", "decoyed test", "validation", "clean test", "class SSIM"]
    return [_EXPLORATION.strip() + "\n\n" + _markdown(head, rows)]


def _decoy_table(runs: Sequence[Run], *, by_weight: bool = False, by_prototypes: bool = False) -> str:
    """A row for each data set, objective and λ, and prototypes; the most accurate objective first, along its λ."""
    best: defaultdict[tuple[str, str], float] = defaultdict(float)
    for run in runs:
        key = (run["dataset"], run["objective"])
        best[key] = max(best[key], float(run["test_accuracy"]))
    runs = sorted(
        runs, key=lambda run: (run["dataset"], -best[run["dataset"], run["objective"]], run["objective"], _weight(run))
    )
    keys = ["dataset", "objective", "weight", "prototypes"]
    rows = []
    for (dataset, objective, weight, prototypes), group in _grouped(runs, *keys).items():
        figures = [Figure.of(run[name] for run in group) for name in ("test_accuracy", "valid_accuracy")]
        figures += [Figure.of(run["clean_test_accuracy"] for run in group)]
        rows.append(
            [
                dataset,
                f"`{objective}`",
                *(["" if objective == "baseline" else f"{weight:g}"] if by_weight else []),
                *([str(prototypes)] if by_prototypes else []),
                *(_text(figure) for figure in figures),
                _text(Figure.of(run["patch_mass"] for run in group), 3),
                _text(Figure.of(run["wrong_reason"] for run in group), 1),
                str(sum(run["dropped_maps"] for run in group)),
            ]
        )
    head = ["data set", "objective", *(["λ"] if by_weight else []), *(["prototypes"] if by_prototypes else [])]
    head += ["decoyed test", "validation", "clean test", "patch mass", "WR", "constant maps"]
    return _markdown(head, rows)


def _goals(along: Sequence[Run], runs: Sequence[Run], others: Sequence[Run]) -> str:
    """What has ten prototypes beside RRR, by the rule that chose λ, and with prototypes of ten images, by the goals."""
    by_rule = decoy_weights(along)
    accuracies = {
        rule: {
            key: Figure.of(run["test_accuracy"] for run in group)
            for key, group in _grouped(
                (run for run in runs if Chosen(run["dataset"], run["objective"], _weight(run)) in chosen),
                *("dataset", "objective"),
            ).items()
        }
        for rule, chosen in by_rule.items()
    }
    rows = [
        [
            dataset,
            f"`{objective}`",
            *(_judged(GOALS[dataset], found.get((dataset, objective))) for found in accuracies.values()),
        ]
        for dataset, objective in sorted({key for found in accuracies.values() for key in found})
        if "psl" in objective or "pdl" in objective or objective == "rrr"
    ]
    tens = [
        f"* {dataset}, ten images a class, `{objective}`: "
        + _judged(GOALS_TEN[dataset], Figure.of(run["test_accuracy"] for run in group))
        for (dataset, objective), group in _grouped(
            [r for r in others if r["prototypes"] == TEN], "dataset", "objective"
        ).items()
    ]
    return "\n\n".join(
        [
            "### The goals",
            _GOALS,
            _markdown(["data set", "objective", *(f"λ by {rule}" for rule in accuracies)], rows),
            *(["\n".join(tens)] if tens else []),
            "Both with the λ of the same rule, seed by seed: mean difference, its standard error (number of pairs).",
            _beside_masks(by_rule, runs),
        ]
    )


def _beside_masks(by_rule: Mapping[str, Sequence[Chosen]], runs: Sequence[Run]) -> str:
    """The accuracy of ten prototypes less that of a mask per image, seed by seed."""

    def by_seed(dataset: str, objective: str, chosen: Sequence[Chosen]) -> dict[int, float]:
        return {
            run["seed"]: run["test_accuracy"]
            for run in runs
            if (run["dataset"], run["objective"]) == (dataset, objective)
            and Chosen(dataset, objective, _weight(run)) in chosen
        }

    def difference(dataset: str, objective: str, chosen: Sequence[Chosen]) -> str:
        return _paired(by_seed(dataset, objective, chosen), by_seed(dataset, "rrr", chosen))

    rows = [
        [dataset, f"`{objective}`", *(difference(dataset, objective, chosen) for chosen in by_rule.values())]
        for dataset in GOALS
        for objective in (*DEPARTURES, SUPPORT)
    ]
    return _markdown(["data set", "less `rrr`", *(f"λ by {rule}" for rule in by_rule)], rows)


_GOALS = (
    "Decoyed test accuracy. The goals, as means of five seeds: "
    + "; ".join(f"{dataset} {goal}, with ten images a class {GOALS_TEN[dataset]}" for dataset, goal in GOALS.items())
    + ". Bold: reached; in italics: above the goal, but of fewer seeds. `rrr` has a mask for every image."
)


def _precisions(runs: Sequence[Run], others: Sequence[Run], in_float32: Sequence[Run]) -> str:
    """Which runs and others are not in bfloat16, and what that changes, seed by seed of the runs."""
    keys = ("dataset", "objective", "weight")
    in_bfloat16 = _grouped((run for run in runs if run["config"]["precision"] == "bf16"), *keys)
    rows = []
    for key, group in _grouped(in_float32, *keys).items():
        dataset, objective, weight = key
        pairs = in_bfloat16.get(key, [])
        cells = [dataset, f"`{objective}`", f"{weight:g}"]
        for name, decimals in (("test_accuracy", 2), ("class_cam_ssim", 3)):
            ours, theirs = ({run["seed"]: float(run[name]) for run in some} for some in (group, pairs))
            cells.append(_paired(ours, theirs, decimals))
        rows.append(cells)
    named = _in_float32([*runs, *others])
    parts = [named] if named else []
    if rows:
        parts.append("Float32 less bfloat16, seed by seed: mean difference, its standard error (number of pairs).")
        parts.append(_markdown(["data set", "objective", "λ", "decoyed test", "class SSIM"], rows))
    return "\n\n".join(["### Precision", *parts]) if parts else ""


def _in_float32(runs: Sequence[Run]) -> str:
    """Which runs are not in bfloat16."""
    plain = [run for run in runs if run["config"]["precision"] == "no"]
    named = [
        f"`{objective}`{'' if objective == 'baseline' else f' at {weight:g}'} on {dataset} ({len(group)})"
        for (dataset, objective, weight), group in _grouped(plain, "dataset", "objective", "weight").items()
    ]
    if not named:
        return ""
    return (
        "The recipe is in bfloat16. A machine whose CPU only emulates it made some runs in float32: "
        + ", ".join(named)
        + "."
    )


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float], decimals: int = 2) -> str:
    """Mean and standard error of the differences of two by seed."""
    difference = Figure.of(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))
    if difference is None or difference.n < 2:
        return NOT_RUN
    return f"{difference.mean:+.{decimals}f}, {difference.error:.{decimals}f} ({difference.n})"


def _judged(goal: float, figure: Figure | None) -> str:
    if figure is None or figure.mean < goal:
        return _text(figure)
    mark = "**" if figure.n >= len(DECOY_SEEDS) else "*"
    return f"{mark}{figure.text()}{mark}"


def _weight(run: Run) -> float:
    return 0.0 if run["objective"] == "baseline" else float(run["weight"])


def _first_line(function: Callable[..., Any]) -> str:
    return " ".join((function.__doc__ or "").split())


def _pictures(results: Path, *datasets: str) -> str:
    """The pictures of these data sets, as far as they were drawn."""
    parts = [
        "Maps of each class over the whole test set, below the prototypes; maps of the predicted class over the first "
        "test image of each class, framed in red where the prediction is wrong. First seed."
    ]
    for dataset in datasets:
        for what in ("class", "image"):
            file = results / f"{what}_maps_{dataset}.png"
            if file.is_file():
                parts.append(f"![{what} maps of {dataset}]({results.name}/{file.name})")
    return "\n\n".join(parts) if len(parts) > 1 else ""


# Small things --------------------------------------------------------------------------------------------


def _grouped(runs: Iterable[Run], *names: str) -> dict[tuple[Any, ...], list[Run]]:
    groups: defaultdict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(run[name] for name in names)].append(run)
    return dict(groups)


def _text(figure: Figure | None, decimals: int = 2) -> str:
    return NOT_RUN if figure is None else figure.text(decimals)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
