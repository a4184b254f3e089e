"""Time of explaining 1,000 images and writing the files ÷ the plain forward pass and writing the same files.

What `batchcam explain RUN_DIR --index 0:1000` does once Python, run and data are loaded: predictions, Grad-CAMs,
distances to every prototype, a picture for each image, JSON and npz. The denominator is `softmax(network(images))`
on the bare network under `torch.inference_mode()`, and writing the same files (pictures drawn and compressed, JSON,
npz) from explanations that stand ready. A second table has a stricter one: pictures that are drawn already.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from distributed_batchcam.checkpoint import Run
from distributed_batchcam.config import RunConfig
from distributed_batchcam.data import load_data
from distributed_batchcam.data.images import TensorImages
from distributed_batchcam.errors import InputError
from distributed_batchcam.explain_run import explain
from distributed_batchcam.explanation_files import save_explanations, save_pictures
from distributed_batchcam.explanations import Explanations
from distributed_batchcam.models import create_model
from distributed_batchcam.report.overlays import panel

from .timing import Bar, Table, argument_parser, choose_device, interleaved, positive, report, steady

PLAIN, DRAWN, OURS = "forward pass, files", "forward pass, drawn pictures", "explain, files"
FORWARD, EXPLAIN, FILES = "forward pass", "explain", "files"
LIMIT, BAR_IMAGES, BAR_DATASET, BAR_THREADS = 1.2, 1000, "mnist", 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argument_parser(
        "explain_speed", "Time of explaining images ÷ plain forward pass, both with files.", rounds=5, warmup=1
    )
    parser.add_argument("--dataset", default=BAR_DATASET, help="data set (%(default)s); digits needs no files")
    parser.add_argument("--images", type=positive, default=BAR_IMAGES, help="how many test images (%(default)s)")
    options = parser.parse_args(arguments)
    device = choose_device(parser, options.device)
    try:
        run, images = untrained_run(options.dataset, options.images)
    except InputError as error:
        parser.error(str(error))

    with steady(options.threads), tempfile.TemporaryDirectory() as folder:
        numbers = iter(range(10**9))
        network = run.model.network.to(device)

        def forward() -> torch.Tensor:
            with torch.inference_mode():
                return network(run.normalize(images.to(device))).softmax(1).cpu()

        def explained() -> Explanations:
            return explain(run, images, device=device.type)

        ready = explained()
        drawn = [panel(ready, index) for index in range(len(ready))]

        def write_drawn() -> list[Path]:
            target = Path(folder, str(next(numbers)))
            target.mkdir()
            paths = [target / f"{index}.png" for index in range(len(drawn))]
            save_pictures(drawn.__getitem__, paths)
            return paths

        def written(explanations: Explanations) -> list[Path]:
            return save_explanations(explanations, Path(folder, str(next(numbers))))

        seconds = interleaved(
            {
                PLAIN: lambda: (forward(), written(ready)),
                DRAWN: lambda: (forward(), write_drawn()),
                OURS: lambda: written(explained()),
                FORWARD: forward,
                EXPLAIN: explained,
                FILES: lambda: written(ready),
            },
            rounds=options.rounds,
            warmup=options.warmup,
            device=device,
        )
    title = f"{len(images)} images of {options.dataset}, simple_cnn, {device.type}"
    tables = [
        Table.of(title, seconds),
        Table.of(f"{title}, beside pictures drawn beforehand", {name: seconds[name] for name in (DRAWN, OURS)}),
    ]
    as_the_bar_says = (
        len(images) == BAR_IMAGES
        and options.dataset == BAR_DATASET
        and device.type == "cpu"
        and options.threads == BAR_THREADS
    )
    bar = Bar(
        f"{OURS} ÷ {PLAIN}, {BAR_IMAGES:,} images of {BAR_DATASET}, cpu, {BAR_THREADS} threads,",
        "at most",
        LIMIT,
        tables[0].row(OURS).ratio.median if as_the_bar_says else None,
    )
    report("explain_speed", options, device, tables, [bar])


def untrained_run(dataset: str, count: int) -> tuple[Run, torch.Tensor]:
    """A run with random weights (none of the arithmetic depends on them), and test images (N, 1, 28, 28) in [0, 1]."""
    data = load_data(dataset)
    torch.manual_seed(0)
    model = create_model("simple_cnn", data.num_classes, data.channels, data.image_size)
    prototypes = {"valid": torch.rand(data.num_classes, data.image_size, data.image_size)}
    run = Run(
        path=Path(),
        name="",
        config=RunConfig(dataset=dataset),
        model=model.eval(),
        classes=data.classes,
        channels=data.channels,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        prototypes=prototypes,
    )
    assert isinstance(data.test, TensorImages)
    return run, data.test.images[:count] / 255


if __name__ == "__main__":
    main()
