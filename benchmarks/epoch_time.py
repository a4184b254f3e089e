"""Time of an epoch by `batchcam train`'s own loop ÷ that of the usual way; and the data pipelines alone.

The usual way: torchvision's data set with `ToTensor` and `Normalize`, a `DataLoader` with worker processes that live on
from epoch to epoch, and a loop prepared by Accelerate that reads the loss at every log step. Model, initial weights,
fused AdamW, schedule, batch size, precision and memory format are the same, and so is the objective: the loss on the
maps is called in the README's three lines. Both go on with their weights from round to round.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToTensor
from tqdm import tqdm

from distributed_batchcam import BatchCAMLoss, create_model
from distributed_batchcam.config import RunConfig
from distributed_batchcam.data import Data, Loader, dataset_prototypes, load_data
from distributed_batchcam.data.images import TensorImages
from distributed_batchcam.errors import InputError
from distributed_batchcam.heartbeat import Heartbeat
from distributed_batchcam.optim import make_optimizer, make_scheduler
from distributed_batchcam.run_directory import RunDirectory
from distributed_batchcam.runtime import start_accelerator
from distributed_batchcam.trainer import Trainer

from .timing import Bar, Table, argument_parser, choose_device, interleaved, positive, report, steady

OURS, USUAL = "batchcam train", "the usual way"
BASELINE, BATCH_CAM = "baseline", "bcpl_l1"
DATASETS = ("mnist", "fashion_mnist", "digits")
MODELS = ("simple_cnn", "resnet18", "convnextv2_tiny")
BAR_DATASET, BAR_MODEL, BAR_BATCH, BAR_THREADS = "mnist", "simple_cnn", 128, 2
EPOCH_BAR = {"cpu": 1.15, "cuda": 10.0}
PIPELINE_BAR = 30.0

Run = Callable[[], object]


class Epochs(NamedTuple):
    """One epoch of each way."""

    ours: Run
    usual: Run


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argument_parser("epoch_time", "Time of an epoch of training ÷ that of the usual way.", rounds=3, warmup=1)
    parser.add_argument("--dataset", default=BAR_DATASET, choices=DATASETS, help="%(default)s; digits needs no files")
    parser.add_argument("--images", type=positive, help="training images of an epoch; default: all")
    parser.add_argument("--model", default=BAR_MODEL, choices=MODELS, help="%(default)s")
    parser.add_argument("--objectives", nargs="+", default=[BASELINE, BATCH_CAM], choices=[BASELINE, BATCH_CAM])
    parser.add_argument("--batch-size", type=positive, default=BAR_BATCH, help="%(default)s")
    parser.add_argument("--workers", type=positive, default=2, help="of the usual way's DataLoader (%(default)s)")
    parser.add_argument("--precision", default="no", choices=["no", "bf16"], help="%(default)s")
    parser.add_argument("--channels-last", action="store_true", help="memory format of both ways")
    parser.add_argument("--cuda-graph", action="store_true", help="ours alone: forward and backward as a CUDA graph")
    options = parser.parse_args(arguments)
    device = choose_device(parser, options.device)
    if options.cuda_graph and device.type != "cuda":
        parser.error("--cuda-graph needs a GPU")
    try:
        data = load_data(options.dataset, valid_size=0)
    except InputError as error:
        parser.error(str(error))
    whole = options.images is None or options.images >= len(data.train)
    if not whole:
        data = load_data(options.dataset, valid_size=0, limit=options.images)
    if options.batch_size > len(data.train):
        parser.error(f"--batch-size {options.batch_size} is above the {len(data.train)} images of an epoch")

    about = f"{len(data.train):,} images of {data.name}, {options.model}, batch {options.batch_size}, {device.type}"
    what = f"{about}, {options.precision if options.precision != 'no' else 'float32'}"
    seconds = {}
    with steady(options.threads), tempfile.TemporaryDirectory() as folder:
        for objective in options.objectives:
            config = RunConfig(
                dataset=data.name,
                model=options.model,
                objective=objective,
                batch_size=options.batch_size,
                # Enough for the schedule; the rate does not matter to the time.
                epochs=options.rounds + options.warmup,
                precision=options.precision,
                channels_last=options.channels_last,
                cuda_graph=options.cuda_graph,
                device=device.type,
                valid_size=0,
                out=Path(folder, objective),
            )
            epochs = training_epochs(config, data, options.workers)
            ways: dict[str, Run] = {OURS: epochs.ours, USUAL: epochs.usual}
            seconds[objective] = interleaved(ways, rounds=options.rounds, warmup=options.warmup, device=device)
        pipelines = pipeline_epochs(data, options.batch_size, options.workers, device)
        alone = interleaved(
            {OURS: pipelines.ours, USUAL: pipelines.usual},
            rounds=options.rounds,
            warmup=options.warmup,
            device=device,
        )
    tables = {objective: Table.of(f"an epoch with {objective}, {what}", times) for objective, times in seconds.items()}
    pipeline = Table.of(f"an epoch of batches without training, {about}", alone)

    as_the_bars_say = (
        (options.dataset, options.model, options.batch_size) == (BAR_DATASET, BAR_MODEL, BAR_BATCH)
        and whole
        and (device.type == "cuda" or options.threads == BAR_THREADS)
    )
    limit = EPOCH_BAR[device.type]
    bars = [
        Bar(
            f"{USUAL} ÷ {OURS}, an epoch of {BAR_DATASET} with {objective}, {BAR_MODEL}, {device.type},",
            "at least",
            limit,
            tables[objective].row(USUAL).ratio.median if as_the_bars_say and objective in tables else None,
        )
        for objective in (BASELINE, BATCH_CAM)
    ]
    bars.append(
        Bar(
            f"{USUAL} ÷ {OURS}, batches of {BAR_DATASET} without training, {device.type},",
            "at least",
            PIPELINE_BAR,
            pipeline.row(USUAL).ratio.median if as_the_bars_say else None,
        )
    )
    settings = {name: getattr(options, name) for name in ("workers", "channels_last", "cuda_graph", "precision")}
    report("epoch_time", options, device, [*tables.values(), pipeline], bars, further=settings)


class Pictures(torchvision.datasets.MNIST):  # type: ignore[misc]
    """torchvision's MNIST, its `__getitem__` and all, of images that are in memory already."""

    def __init__(self, images: Tensor, targets: Tensor, transform: Callable[[Any], Tensor]) -> None:
        torchvision.datasets.VisionDataset.__init__(self, transform=transform)
        self.data = images
        self.targets = targets


def picture_loader(data: Data, batch_size: int, workers: int, device: torch.device) -> "DataLoader[Any]":
    """The usual `DataLoader` of the training set."""
    assert isinstance(data.train, TensorImages)
    transform = Compose([ToTensor(), Normalize(data.mean, data.std)])
    return DataLoader(
        Pictures(data.train.images[:, 0], data.train.targets, transform),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )


def training_epochs(config: RunConfig, data: Data, workers: int) -> Epochs:
    """The trainer's epoch, without validation and checkpoint, and the usual loop with Accelerate."""
    accelerator = start_accelerator(config)
    heartbeat = Heartbeat(accelerator, config.timeout)
    trainer = Trainer(config, accelerator, heartbeat, data, RunDirectory.choose(config))
    trainer.open_run()
    quiet: tqdm[Any] = tqdm(disable=True)

    device = accelerator.device
    torch.manual_seed(config.seed)
    model = create_model(config.model, data.num_classes, data.channels, data.image_size).to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(config, model)
    scheduler = make_scheduler(config, optimizer, trainer.steps_per_epoch * config.epochs)
    batch_cam = BatchCAMLoss(dataset_prototypes(data.train, data.num_classes)).to(device)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, picture_loader(data, config.batch_size, workers, device), scheduler
    )

    def usual() -> float:
        model.train()
        shown = 0.0
        for step, (images, targets) in enumerate(loader, 1):
            if config.channels_last:
                images = images.to(memory_format=torch.channels_last)
            output = model(images)
            loss = F.cross_entropy(output.logits, targets)
            if config.objective == BATCH_CAM:
                cam = batch_cam(output.logits, output.features, targets, alpha=output.alpha)
                loss = loss + config.weight * cam
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if step % config.log_every == 0:
                shown = loss.item()
        return shown

    return Epochs(lambda: trainer.train_epoch(quiet), usual)


def pipeline_epochs(data: Data, batch_size: int, workers: int, device: torch.device) -> Epochs:
    """Normalised batches on the device, an epoch of them, and nothing done with them."""
    own = Loader(data.train, batch_size, device, shuffle=True, drop_last=True)
    pictures = picture_loader(data, batch_size, workers, device)
    numbers = iter(range(1_000_000))

    def ours() -> None:
        for batch in own.epoch(next(numbers)):
            data.normalize(batch.images)

    def usual() -> None:
        for images, targets in pictures:
            images.to(device, non_blocking=True)
            targets.to(device, non_blocking=True)

    return Epochs(ours, usual)


if __name__ == "__main__":
    main()
