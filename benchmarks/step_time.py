"""Time of a training step with each objective ÷ the step of a plain network with cross-entropy.

A step is forward, loss, backward, AdamW, zero_grad. The denominator is what one would write without this
package: `F.cross_entropy(network(images), targets)` on the bare network, without its feature maps or α.
`baseline`, this package's cross-entropy objective, is one of the variants. All share the same weights.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_batchcam.config import RunConfig
from distributed_batchcam.errors import InputError
from distributed_batchcam.models import CAMModel, create_model
from distributed_batchcam.objectives import OBJECTIVES, Objective
from distributed_batchcam.optim import make_optimizer

from .timing import Bar, Table, argument_parser, choose_device, measure, positive, report, steady

NUM_CLASSES, IMAGE_SIZE = 10, 28
BATCH_SIZES, OTHER_BATCH_SIZE = {"simple_cnn": 128}, 64
# The weights hardly move: the same batch over and over would else be learnt by heart, and vanishing gradients
# become denormal numbers, which are slow.
LEARNING_RATE = 1e-9
PLAIN = "plain"
# (model, batch size, objective, times the plain step), on the CPU with two threads.
BARS = [("simple_cnn", 128, "bcpl_l1", 1.15), ("resnet18", 64, "bcpl_l1", 1.03)]
BAR_THREADS = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argument_parser(
        "step_time", "Time of a training step with each objective ÷ that of the plain step.", rounds=20
    )
    parser.add_argument("--models", nargs="+", default=["simple_cnn", "resnet18"], help="simple_cnn resnet18")
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES, help="all")
    parser.add_argument("--batch-size", type=positive, help="128 for simple_cnn, 64 for others")
    options = parser.parse_args(arguments)
    device = choose_device(parser, options.device)

    tables: dict[tuple[str, int], Table] = {}
    with steady(options.threads):
        for name in options.models:
            batch_size = options.batch_size or BATCH_SIZES.get(name, OTHER_BATCH_SIZE)
            try:
                variants = training_steps(name, options.objectives, batch_size, device)
            except InputError as error:
                parser.error(str(error))
            title = f"training step, {name}, batch {batch_size}, {device.type}"
            tables[name, batch_size] = measure(
                title, variants, rounds=options.rounds, warmup=options.warmup, device=device
            )
    as_the_bars_say = device.type == "cpu" and options.threads == BAR_THREADS
    bars = [
        Bar(
            f"{objective} ÷ plain, {model}, batch {batch_size}, cpu, {BAR_THREADS} threads,",
            "at most",
            limit,
            _ratio(tables.get((model, batch_size)), objective) if as_the_bars_say else None,
        )
        for model, batch_size, objective, limit in BARS
    ]
    report("step_time", options, device, list(tables.values()), bars)


def training_steps(
    name: str, objectives: Sequence[str], batch_size: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    """By variant, a function that does a training step; the plain one first."""
    torch.manual_seed(0)
    model = create_model(name, NUM_CLASSES, 1, IMAGE_SIZE).to(device).train()
    optimizer = make_optimizer(RunConfig(lr=LEARNING_RATE), model)
    images, targets, prototypes = random_batch(batch_size, device)

    def plain_loss() -> Tensor:
        return F.cross_entropy(model.network(images), targets)

    def loss_of(objective: Objective) -> Callable[[], Tensor]:
        return lambda: objective_loss(model, objective, images, targets)

    losses = {PLAIN: plain_loss, **{name: loss_of(Objective(name, prototypes)) for name in objectives}}
    return {name: training_step(loss, optimizer) for name, loss in losses.items()}


def random_batch(batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random images (N, 1, s, s), targets (N,) with all classes where N allows it, random prototypes (C, s, s)."""
    return (
        torch.rand(batch_size, 1, IMAGE_SIZE, IMAGE_SIZE).to(device),
        torch.arange(batch_size).remainder(NUM_CLASSES).to(device),
        torch.rand(NUM_CLASSES, IMAGE_SIZE, IMAGE_SIZE).to(device),
    )


def training_step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A training step that starts from a function of the forward pass and the loss."""

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def objective_loss(model: CAMModel, objective: Objective, images: Tensor, targets: Tensor) -> Tensor:
    """Forward pass and objective, called as the trainer calls them."""
    output = model(images)
    parts = objective(
        output.logits,
        output.features,
        targets,
        images,
        alpha=output.alpha,
        batch_size=len(images),
    )
    total: Tensor = parts.total
    return total


def _ratio(table: Table | None, variant: str) -> float | None:
    if table is None or all(row.name != variant for row in table.rows):
        return None
    return table.row(variant).ratio.median


if __name__ == "__main__":
    main()
