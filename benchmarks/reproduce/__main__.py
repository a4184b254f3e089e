"""`python -m benchmarks.reproduce`: the paper's tables and the decoys, run as far as is left, and written up."""

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

from distributed_batchcam.checkpoint import load_run
from distributed_batchcam.data import dataset_prototypes, load_data, random_selection, save_prototype_images
from distributed_batchcam.errors import InputError
from distributed_batchcam.explanation_files import NewFolder
from distributed_batchcam.models import PAPER_MODELS
from distributed_batchcam.runtime import emulates_bf16
from tune.space import Space

from . import stages
from .collect import by_trial, collect, evaluate_in_full, read_runs, write_runs
from .figures import draw_figures
from .page import write_page
from .sketches import write_sketches
from .stages import CLEAN, DECOYED, PLAIN, SKETCHES, TEN, Workshop
from .weights import Chosen, decoy_weights, table_weights

PARTS = ("tables", "decoys")
RESULTS = Path("docs/results")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce", description=__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=PAPER_MODELS, help="default: all with a GPU, otherwise simple_cnn"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: both")
    parser.add_argument("--storage", type=Path, default=Path("runs/reproduce"), help="of the runs (%(default)s)")
    parser.add_argument("--data-root", type=Path, help="folder of MNIST and Fashion-MNIST, downloaded where missing")
    parser.add_argument("--address", help="Ray cluster to join")
    parser.add_argument("--gpus-per-worker", help="share of a GPU for each run")
    parser.add_argument("--missing", action="store_true", help="run only what docs/results does not hold")
    parser.add_argument("--page-only", action="store_true", help="run nothing: write up what is there")
    options = parser.parse_args(arguments)
    models = options.models or (PAPER_MODELS if torch.cuda.is_available() else PAPER_MODELS[:1])
    further = [("--data-root", options.data_root), ("--address", options.address)]
    further += [("--gpus-per-worker", options.gpus_per_worker)]
    sweep_options = [text for name, value in further if value is not None for text in (name, str(value))]
    # Of a cluster's machines this one says nothing.
    device = torch.device("cuda" if options.address or torch.cuda.is_available() else "cpu")
    workshop = Workshop(options.storage, sweep_options, options.missing, float32=emulates_bf16(device))
    try:
        if not options.page_only:
            for name in PLAIN.values():  # before anything starts; downloaded here, by one process, where it is missing
                load_data(name, data_root=options.data_root)
            if "tables" in options.parts:
                run_tables(workshop, models)
            if "decoys" in options.parts:
                run_decoys(workshop, options.data_root)
    except InputError as error:
        parser.error(str(error))
    finally:
        # What was finished is written up, whatever stopped the rest.
        draw_figures(RESULTS, workshop)
        print(f"batchcam: results are in {write_page(RESULTS)}", flush=True)


def run_tables(workshop: Workshop, models: Sequence[str]) -> None:
    """Table A1 under both protocols, and Table 2 where all models are wanted."""
    run_stage(workshop, "weights", stages.weights_space())
    weights = table_weights(read_runs(RESULTS, "weights"))
    for table, held_out in (("table_a1", False), ("table_a1_held_out", True)):
        for model in models:
            name = f"{table}-{model}"
            space = stages.table_space(model, weights, held_out=held_out)
            run_stage(workshop, name, space)
            if held_out:
                explain_first_seed(workshop, name, space)
    if len(models) == len(PAPER_MODELS):
        run_stage(workshop, "table_2", stages.large_table_space(weights))


def run_decoys(workshop: Workshop, data_root: Path | None) -> None:
    """λ for each objective, five seeds of what the rules chose, other prototypes, clean data, another precision."""
    prototypes = workshop.storage / "prototypes"
    make_prototypes(prototypes, data_root)
    run_stage(workshop, "decoy_weights", stages.decoy_weights_space(prototypes), prototypes=CLEAN)
    by_rule = decoy_weights(read_runs(RESULTS, "decoy_weights"))
    departure, support = (
        [choice for choice in by_rule["wrong-reason score"] if choice.objective == objective]
        for objective in (stages.DEPARTURE, stages.SUPPORT)
    )
    # Departures are from prototypes that are averages as well: all of a drawing departs, and of the data's own nothing.
    for kind, ours in ((TEN, [*departure, *support]), (SKETCHES, support), (DECOYED, support)):
        space = stages.decoy_prototypes_space(prototypes, kind, ours)
        run_stage(workshop, f"decoy_{kind}", space, prototypes=kind)
    run_stage(workshop, "decoy_clean", stages.clean_space([*support, *(Chosen(name, "baseline", 0) for name in PLAIN)]))
    # In the order in which seeds are run, first for the rule that the README quotes.
    chosen = list(dict.fromkeys(chain(by_rule["unbiased accuracy"], *by_rule.values())))
    headline = [choice for choice in chosen if choice.objective in stages.HEADLINE]
    others = [choice for choice in chosen if choice not in headline]
    for name, choices in (("decoy_seeds", headline), ("decoy_other_seeds", others)):
        run_stage(workshop, name, stages.decoy_seeds_space(prototypes, choices), prototypes=CLEAN)
    run_stage(workshop, "decoy_float32", stages.decoy_float32_space(prototypes, support), prototypes=CLEAN)


def explain_first_seed(workshop: Workshop, name: str, space: Space) -> None:
    """Every figure of explanations for the first seed of each row of a stage."""
    for path in workshop.runs(name):
        if load_run(path).config.seed == stages.SEEDS[0]:
            evaluate_in_full(path)
    record_stage(workshop, name, space)


def run_stage(workshop: Workshop, name: str, space: Space, **about: str) -> None:
    """Run a stage; what it finished is kept in docs/results, whatever stopped the rest."""
    space = workshop.suited(space)
    try:
        workshop.run(name, space, by_trial(space, read_runs(RESULTS, name)) if workshop.missing else ())
    finally:
        record_stage(workshop, name, space, **about)


def record_stage(workshop: Workshop, name: str, space: Space, **about: str) -> None:
    """Write docs/results/NAME.json: what was run here, and of trials not run here what the file held of them."""
    here = by_trial(space, collect(workshop.runs(name), **about))
    found = by_trial(space, read_runs(RESULTS, name)) | here
    write_runs(RESULTS, name, [found[trial.id] for trial in space.trials() if trial.id in found])


def make_prototypes(folder: Path, data_root: Path | None) -> None:
    """Ten pictures for each data set and kind: FOLDER/mnist-clean, -ten, -sketches, and those of Fashion-MNIST."""
    for name in PLAIN.values():
        data = None
        for kind, per_class in ((CLEAN, None), (TEN, 10)):
            target = folder / f"{name}-{kind}"
            if target.is_dir():
                continue
            data = data or load_data(name, data_root=data_root, valid_size=0)
            images = data.train
            if per_class is not None:
                images = images.subset(random_selection(images.targets, per_class, data.classes))
            with NewFolder(target) as new:
                save_prototype_images(new, dataset_prototypes(images, data.num_classes), data.classes)
    write_sketches(folder, f"-{SKETCHES}")


if __name__ == "__main__":
    main()
