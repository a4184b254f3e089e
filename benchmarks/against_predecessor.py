"""Time of Grad-CAM one image after another, as in the paper's algorithms, ÷ that of `grad_cam` for the whole batch.

Four measurements, each with this package's ways first:

* maps: of a batch whose logits and features stand, graph and all; the forward pass is not timed. This carries the
  bars, against each of the two algorithms: it is the part that differs. `grad_cam` is called as anybody would, where
  autograd finds α, and with the closed form of α that models of this package hand out, as the trainer calls it.
* differentiable maps: the same with `create_graph=True`, as a loss needs them; hooks cannot do that.
* images to maps: the forward pass included; here also the hooks with a forward pass for each image.
* training step: forward, cross-entropy + λ·(L1 prototype loss), backward, AdamW, zero_grad.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_batchcam import grad_cam
from distributed_batchcam.config import RunConfig
from distributed_batchcam.distances import l1_distance, resize_maps
from distributed_batchcam.models import CAMModel, create_model
from distributed_batchcam.objectives import Objective
from distributed_batchcam.optim import make_optimizer

from .predecessor import (
    HookableNetwork,
    Hooks,
    gradcam_by_hooks,
    gradcam_by_hooks_alone,
    gradcam_by_loop,
    maps_of_hooks,
)
from .step_time import IMAGE_SIZE, LEARNING_RATE, NUM_CLASSES, objective_loss, random_batch, training_step
from .timing import Bar, Table, argument_parser, choose_device, interleaved, positive, report, steady

MODEL = "simple_cnn"
WEIGHT = 0.1
BAR_BATCH, BARS = 128, {"cpu": 80.0, "cuda": 100.0}
GENERAL, CLOSED_FORM = "grad_cam", "grad_cam, closed-form α"
HOOKS, HOOKS_ALONE, LOOP = "Algorithm 2, hooks", "Algorithm 2, hooks, alone", "Algorithm 1, loop"

Variants = dict[str, Callable[[], object]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argument_parser(
        "against_predecessor", "Time of Grad-CAM image by image ÷ that of grad_cam for the whole batch.", rounds=10
    )
    parser.add_argument("--batch-size", type=positive, default=BAR_BATCH, help="%(default)s")
    options = parser.parse_args(arguments)
    device = choose_device(parser, options.device)

    torch.manual_seed(0)
    model = create_model(MODEL, NUM_CLASSES, 1, IMAGE_SIZE).to(device)
    images, targets, prototypes = random_batch(options.batch_size, device)

    def timed(what: str, variants: Variants) -> dict[str, Table]:
        """The same rounds twice: ÷ grad_cam by autograd, and ÷ grad_cam with α in closed form where that is there."""
        seconds = interleaved(variants, rounds=options.rounds, warmup=options.warmup, device=device)
        title = f"{what}, {MODEL}, batch {len(images)}, {device.type}"
        references = [name for name in (next(iter(variants)), CLOSED_FORM) if name in variants]
        return {
            reference: Table.of(f"{title}, ÷ {reference}", {reference: seconds[reference], **seconds})
            for reference in references
        }

    hookable = HookableNetwork(model.network)
    with steady(options.threads):
        with Hooks(hookable.target) as hooks:
            maps = timed("maps (forward pass not timed)", maps_of_a_graph(model, hookable, hooks, images))
        others = [
            timed("differentiable maps (forward pass not timed)", differentiable_maps(model, images)),
            timed("images to maps", images_to_maps(model, hookable, images)),
            timed("training step, pl_l1", training_steps(model, images, targets, prototypes)),
        ]
    bars = [
        Bar(
            f"{algorithm} ÷ {ours}, maps of a {MODEL} batch of {BAR_BATCH}, forward pass not timed, {device.type},",
            "at least",
            BARS[device.type],
            maps[ours].row(algorithm).ratio.median if options.batch_size == BAR_BATCH else None,
        )
        for ours in (CLOSED_FORM, GENERAL)
        for algorithm in (LOOP, HOOKS)
    ]
    tables = [table for found in (maps, *others) for table in found.values()]
    report("against_predecessor", options, device, tables, bars)


def maps_of_a_graph(model: CAMModel, hookable: HookableNetwork, hooks: Hooks, images: Tensor) -> Variants:
    """Maps without a graph of their own, from logits and features that stand; `hooks` are on `hookable`."""
    output, hooked_logits = model(images), hookable(images)
    return {
        GENERAL: lambda: grad_cam(output.logits, output.features),
        CLOSED_FORM: lambda: grad_cam(output.logits, output.features, alpha=output.alpha),
        LOOP: lambda: gradcam_by_loop(output.logits, output.features, create_graph=False),
        HOOKS: lambda: maps_of_hooks(hookable, hooked_logits, hooks),
    }


def differentiable_maps(model: CAMModel, images: Tensor) -> Variants:
    """Maps for use in a loss, from logits and features that stand."""
    output = model(images)
    return {
        GENERAL: lambda: grad_cam(output.logits, output.features, create_graph=True),
        CLOSED_FORM: lambda: grad_cam(output.logits, output.features, create_graph=True, alpha=output.alpha),
        LOOP: lambda: gradcam_by_loop(output.logits, output.features),
    }


def images_to_maps(model: CAMModel, hookable: HookableNetwork, images: Tensor) -> Variants:
    """Forward pass and maps."""

    def batched() -> Tensor:
        output = model(images)
        return grad_cam(output.logits, output.features)

    def batched_closed_form() -> Tensor:
        output = model(images)
        return grad_cam(output.logits, output.features, alpha=output.alpha)

    def looped() -> Tensor:
        output = model(images)
        return gradcam_by_loop(output.logits, output.features, create_graph=False)

    return {
        GENERAL: batched,
        CLOSED_FORM: batched_closed_form,
        LOOP: looped,
        HOOKS: lambda: gradcam_by_hooks(hookable, images),
        HOOKS_ALONE: lambda: gradcam_by_hooks_alone(hookable, images),
    }


def training_steps(model: CAMModel, images: Tensor, targets: Tensor, prototypes: Tensor) -> Variants:
    """Whole training steps with the L1 prototype loss."""
    optimizer = make_optimizer(RunConfig(lr=LEARNING_RATE), model)
    objective = Objective("pl_l1", prototypes, weight=WEIGHT)

    def loop_loss() -> Tensor:
        output = model(images)
        maps = resize_maps(gradcam_by_loop(output.logits, output.features), (IMAGE_SIZE, IMAGE_SIZE))
        distance = l1_distance(maps, prototypes[targets]).mean()
        return F.cross_entropy(output.logits, targets) + WEIGHT * distance

    return {
        "PrototypeLoss": training_step(lambda: objective_loss(model, objective, images, targets), optimizer),
        LOOP: training_step(loop_loss, optimizer),
    }


if __name__ == "__main__":
    main()
