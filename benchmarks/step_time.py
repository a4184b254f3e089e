"""Time of a training step with each objective ÷ the step of a plain network with cross-entropy.

A step is forward, loss, backward, AdamW, zero_grad. The denominator is what one would write without this
package: `F.cross_entropy(network(images), targets)` on the bare network, without its feature maps or α.
`baseline`, this package's cross-entropy objective, is one of the variants. All share the same weights, and all
have the same setting: precision, memory format, either the network compiled as a whole (plain) and its backbone and
the arithmetic of the maps (the others), or nothing compiled, and forward and backward as a CUDA graph, or not. Where
masks are asked for, they are a corner of 4×4 pixels, as of the decoy data sets.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_batchcam.config import RunConfig
from distributed_batchcam.cuda_graph import GraphedPass
from distributed_batchcam.errors import InputError
from distributed_batchcam.models import PAPER_MODELS, CAMModel, create_model
from distributed_batchcam.objectives import OBJECTIVES, CAMLossOptions, Objective
from distributed_batchcam.optim import make_optimizer

from .timing import Bar, Table, argument_parser, choose_device, measure, positive, report, steady

NUM_CLASSES, IMAGE_SIZE = 10, 28
BATCH_SIZES, OTHER_BATCH_SIZE = {"simple_cnn": 128}, 64
# The weights hardly move: the same batch over and over would else be learnt by heart, and vanishing gradients
# become denormal numbers, which are slow.
LEARNING_RATE = 1e-9
# These differentiate the whole network twice, which compiled code cannot be: by name only, and not compiled.
_TWICE = ("pdl", "rrr")
USUAL_OBJECTIVES = tuple(name for name in OBJECTIVES if name not in _TWICE)
PLAIN, BASELINE = "plain", "baseline"
BAR_OBJECTIVE, BAR_THREADS = "bcpl_l1", 2
# Times the plain step (on the CPU also the baseline's) at the batch sizes above: on the CPU in float32, on a GPU in the
# fastest setting of both.
CPU_BARS = {"simple_cnn": 1.06, "resnet18": 1.02, "convnextv2_tiny": 1.02}
GPU_BARS = {"simple_cnn": 1.10, "resnet18": 1.03, "convnextv2_tiny": 1.03}


class Setting(NamedTuple):
    """How all variants of a table run."""

    precision: str = "no"
    compiled: bool = False
    channels_last: bool = False
    cuda_graph: bool = False

    @property
    def text(self) -> str:
        """In words."""
        words = ["float32" if self.precision == "no" else self.precision]
        words += ["compiled"] * self.compiled + ["channels-last"] * self.channels_last
        words += ["CUDA graph"] * self.cuda_graph
        return " ".join(words)


Tables = Mapping[tuple[str, Setting], Table]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argument_parser(
        "step_time", "Time of a training step with each objective ÷ that of the plain step.", rounds=20
    )
    parser.add_argument("--models", nargs="+", default=PAPER_MODELS, help=" ".join(PAPER_MODELS))
    parser.add_argument(
        "--objectives",
        nargs="+",
        default=USUAL_OBJECTIVES,
        metavar="NAME",
        help=f"all but {' and '.join(_TWICE)}; sums as well",
    )
    parser.add_argument("--batch-size", type=positive, help="128 for simple_cnn, 64 for others")
    parser.add_argument("--precisions", nargs="+", default=["no"], choices=["no", "bf16"], help="no (float32)")
    parser.add_argument("--compile", nargs="+", default=["no"], choices=["no", "yes"], help="no")
    parser.add_argument("--channels-last", nargs="+", default=["no"], choices=["no", "yes"], help="no")
    parser.add_argument("--cuda-graph", nargs="+", default=["no"], choices=["no", "yes"], help="no")
    options = parser.parse_args(arguments)
    device = choose_device(parser, options.device)
    if "yes" in options.cuda_graph and device.type != "cuda":
        parser.error("--cuda-graph yes needs a GPU")
    settings = [
        Setting(precision, *(choice == "yes" for choice in choices))
        for precision, *choices in product(
            options.precisions, options.compile, options.channels_last, options.cuda_graph
        )
    ]

    tables: dict[tuple[str, Setting], Table] = {}
    with steady(options.threads):
        for name in options.models:
            batch_size = options.batch_size or BATCH_SIZES.get(name, OTHER_BATCH_SIZE)
            for setting in settings:
                try:
                    variants = training_steps(name, options.objectives, batch_size, device, setting)
                except InputError as error:
                    parser.error(str(error))
                title = f"training step, {name}, batch {batch_size}, {device.type}, {setting.text}"
                tables[name, setting] = measure(
                    title, variants, rounds=options.rounds, warmup=options.warmup, device=device
                )
    report("step_time", options, device, list(tables.values()), bars(tables, options, device))


def bars(tables: Tables, options: argparse.Namespace, device: torch.device) -> list[Bar]:
    """Of the CPU and of a GPU; those of the device that this is not are not measured."""
    usual = options.batch_size is None and BAR_OBJECTIVE in options.objectives
    on_cpu = usual and device.type == "cpu" and options.threads == BAR_THREADS
    on_gpu = usual and device.type == "cuda"
    found = []
    for model, limit in CPU_BARS.items():
        table = tables.get((model, Setting())) if on_cpu else None
        batch = BATCH_SIZES.get(model, OTHER_BATCH_SIZE)
        for reference in (BASELINE, PLAIN):
            measured = None
            if table is not None and reference in (PLAIN, *options.objectives):
                measured = table.ratio(BAR_OBJECTIVE, reference).median
            what = f"{BAR_OBJECTIVE} ÷ {reference}, {model}, batch {batch}, cpu, {BAR_THREADS} threads,"
            found.append(Bar(what, "at most", limit, measured))
    for model, limit in GPU_BARS.items():
        of_model = [table for (name, _), table in tables.items() if name == model]
        found.append(
            Bar(
                f"{BAR_OBJECTIVE} ÷ {PLAIN}, {model}, cuda, fastest setting of both,",
                "at most",
                limit,
                fastest(of_model, BAR_OBJECTIVE) / fastest(of_model, PLAIN) if on_gpu and of_model else None,
            )
        )
    return found


def fastest(tables: Sequence[Table], variant: str) -> float:
    """Median seconds of a variant in the setting that suits it best."""
    return min(table.row(variant).seconds.median for table in tables)


def training_steps(
    name: str,
    objectives: Sequence[str],
    batch_size: int,
    device: torch.device,
    setting: Setting = Setting(),  # noqa: B008  (immutable)
    *,
    image_size: int = IMAGE_SIZE,
) -> dict[str, Callable[[], None]]:
    """By variant, a function that does a training step; the plain one first."""
    torch.manual_seed(0)
    model = create_model(name, NUM_CLASSES, 1, image_size).to(device).train()
    images, targets, prototypes = random_batch(batch_size, device, image_size)
    if setting.channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = make_optimizer(RunConfig(lr=LEARNING_RATE), model)
    network: Any = model.network
    if setting.compiled:
        network = torch.compile(network)
        model.compile_backbone()

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16")

    def plain_loss() -> Tensor:
        with autocast():
            logits = network(images)
        return F.cross_entropy(logits.float(), targets)

    def loss_of(objective: Objective) -> Callable[[], Tensor]:
        if objective.differentiates_images:
            if setting.compiled:
                raise InputError(f"{objective.name} differentiates the network twice: leave --compile out")
            model.allow_double_backward()
        if setting.compiled:
            objective.compile_maps()
        return lambda: objective_loss(model, objective, images, targets, autocast)

    options = CAMLossOptions(class_means=partial(torch.rand_like, prototypes))
    losses = {PLAIN: plain_loss}
    losses |= {name: loss_of(Objective(name, prototypes, options=options)) for name in objectives}
    return {name: training_step(loss, optimizer, cuda_graph=setting.cuda_graph) for name, loss in losses.items()}


def random_batch(batch_size: int, device: torch.device, size: int = IMAGE_SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Random images (N, 1, s, s), targets (N,) with all classes where N allows it, random prototypes (C, s, s)."""
    return (
        torch.rand(batch_size, 1, size, size).to(device),
        torch.arange(batch_size).remainder(NUM_CLASSES).to(device),
        torch.rand(NUM_CLASSES, size, size).to(device),
    )


def corner_masks(images: Tensor) -> Tensor:
    """(N, h, w), bool: the 4×4 pixels of one corner of images (N, ch, h, w)."""
    masks = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool, device=images.device)
    masks[:, :4, :4] = True
    return masks


def training_step(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, *, cuda_graph: bool = False
) -> Callable[[], None]:
    """A training step that starts from a function of the forward pass and the loss."""

    def backward() -> None:
        loss().backward()

    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    forward_backward = GraphedPass(backward, trained) if cuda_graph else backward

    def step() -> None:
        forward_backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def objective_loss(
    model: CAMModel,
    objective: Objective,
    images: Tensor,
    targets: Tensor,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Forward pass and objective, called as the trainer calls them."""
    # The same pixels; a gradient of theirs in this objective alone.
    images = images.detach().requires_grad_(objective.differentiates_images)
    with autocast():
        output = model(images)
    parts = objective(
        output.logits,
        output.features,
        targets,
        images,
        alpha=output.alpha,
        batch_size=len(images),
        masks=corner_masks(images) if objective.needs_masks else None,
    )
    total: Tensor = parts.total
    return total


if __name__ == "__main__":
    main()
