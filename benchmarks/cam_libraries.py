"""Time from images to Grad-CAM maps ÷ the forward pass alone, and against three CAM libraries.

Every library explains the predicted classes, on one network with one set of weights. Before anything is timed its
maps are compared with this package's: timing something else that happens to be called Grad-CAM would say nothing.
For that the network is first trained for a few steps on the embedded digits, since an untrained one says much the
same of every image.
"""

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_batchcam import create_model, grad_cam
from distributed_batchcam.cam import normalize_maps
from distributed_batchcam.config import RunConfig
from distributed_batchcam.data import Loader, load_data
from distributed_batchcam.distances import resize_maps
from distributed_batchcam.models import PAPER_MODELS, CAMModel
from distributed_batchcam.optim import make_optimizer

from .predecessor import HookableNetwork
from .timing import Bar, Table, argument_parser, choose_device, interleaved, positive, report, steady

NUM_CLASSES, IMAGE_SIZE = 10, 28
TRAINING_STEPS, TRAINING_BATCH, LEARNING_RATE = 40, 32, 3e-4
PACKAGES, MODULES = ("grad-cam", "torchcam", "captum"), ("pytorch_grad_cam", "torchcam.methods", "captum.attr")
FORWARD, OURS, OURS_RESIZED = "forward pass", "this package", "this package, resized"
PYTORCH_GRAD_CAM, PYTORCH_GRAD_CAM_FROZEN = "pytorch-grad-cam", "pytorch-grad-cam, frozen"
TORCH_CAM, CAPTUM = "torch-cam", "captum"
# By reference, what is compared with it: maps of the feature maps' size with their like, resized ones with theirs.
COMPARISONS = {
    FORWARD: [OURS, OURS_RESIZED, TORCH_CAM, CAPTUM, PYTORCH_GRAD_CAM, PYTORCH_GRAD_CAM_FROZEN],
    OURS: [TORCH_CAM, CAPTUM],
    OURS_RESIZED: [PYTORCH_GRAD_CAM, PYTORCH_GRAD_CAM_FROZEN],
}
BAR_MODEL, BAR_BATCH, BAR_THREADS = "resnet18", 64, 2
MIN_CORRELATION = 0.999

Variants = dict[str, Callable[[], Tensor]]


class Agreement(NamedTuple):
    """How alike two sets of maps are."""

    correlation: float  # the lowest Pearson correlation of an image's two maps
    compared: int  # images whose maps both vary
    constant: int  # images whose maps are both constant: alike, but with no correlation


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argument_parser(
        "cam_libraries", "Time from images to Grad-CAM maps ÷ the forward pass, and against CAM libraries.", rounds=40
    )
    parser.add_argument("--models", nargs="+", default=PAPER_MODELS, choices=PAPER_MODELS, help="all")
    parser.add_argument("--batch-size", type=positive, default=BAR_BATCH, help="%(default)s")
    options = parser.parse_args(arguments)
    device = choose_device(parser, options.device)
    _require_libraries(parser)

    tables: dict[tuple[str, str], Table] = {}
    agreements: dict[str, dict[str, Agreement]] = {}
    with steady(options.threads):
        for name in options.models:
            model, images = trained_model(name, options.batch_size, device)
            variants = images_to_maps(model, images)
            agreements[name] = _agreements(name, variants)
            seconds = interleaved(variants, rounds=options.rounds, warmup=options.warmup, device=device)
            for reference, others in COMPARISONS.items():
                title = f"images to maps ÷ {reference}, {name}, batch {len(images)}, {device.type}"
                tables[name, reference] = Table.of(title, {row: seconds[row] for row in [reference, *others]})

    further = {
        "agreement": {
            name: {library: found._asdict() for library, found in of_model.items()}
            for name, of_model in agreements.items()
        }
    }
    bars = _bars(tables, options, device)
    report("cam_libraries", options, device, list(tables.values()), bars, packages=PACKAGES, further=further)


def _bars(tables: Mapping[tuple[str, str], Table], options: argparse.Namespace, device: torch.device) -> list[Bar]:
    """On a GPU as on the CPU, there with two threads."""
    on_cpu = device.type == "cpu"
    as_the_bars_say = options.batch_size == BAR_BATCH and (options.threads == BAR_THREADS or not on_cpu)

    def bar(row: str, reference: str, direction: Literal["at most", "at least"], limit: float) -> Bar:
        what = f"{row} ÷ {reference}, {BAR_MODEL}, batch {BAR_BATCH}, {device.type},"
        table = tables.get((BAR_MODEL, reference)) if as_the_bars_say else None
        return Bar(
            f"{what} {BAR_THREADS} threads," if on_cpu else what,
            direction,
            limit,
            None if table is None else table.row(row).ratio.median,
        )

    return [
        bar(OURS, FORWARD, "at most", 1.05),
        bar(PYTORCH_GRAD_CAM, OURS_RESIZED, "at least", 3),
        bar(TORCH_CAM, OURS, "at least", 1),
        bar(CAPTUM, OURS, "at least", 1),
    ]


def _require_libraries(parser: argparse.ArgumentParser) -> None:
    """End the program where one of them cannot be imported."""
    for module in MODULES:
        try:
            import_module(module)
        except ImportError as error:
            parser.error(f"{module} cannot be imported ({error}); pip install -c constraints.txt -e '.[comparisons]'")


def trained_model(name: str, batch_size: int, device: torch.device) -> tuple[CAMModel, Tensor]:
    """A network after a few training steps, frozen and in eval mode, and test images for it to explain."""
    torch.manual_seed(0)
    model = create_model(name, NUM_CLASSES, 1, IMAGE_SIZE).to(device).train()
    optimizer = make_optimizer(RunConfig(lr=LEARNING_RATE), model)
    data = load_data("digits", image_size=IMAGE_SIZE)
    batches = Loader(data.train, TRAINING_BATCH, device, shuffle=True).epoch()
    for batch, _ in zip(batches, range(TRAINING_STEPS), strict=False):
        F.cross_entropy(model(data.normalize(batch.images)).logits, batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().requires_grad_(False)
    images = next(Loader(data.test, batch_size, device).epoch()).images
    return model, data.normalize(images)


def images_to_maps(model: CAMModel, images: Tensor) -> Variants:
    """By variant, a function from images to maps; the forward pass alone comes first.

    Each library gets a copy of the network of its own: their hooks stay on it.
    """
    from captum.attr import LayerGradCam
    from pytorch_grad_cam import GradCAM as PytorchGradCAM
    from torchcam.methods import GradCAM as TorchCAM

    network = model.network

    def hookable(*, frozen: bool) -> HookableNetwork:
        return HookableNetwork(copy.deepcopy(network).requires_grad_(not frozen)).eval()

    @torch.inference_mode()
    def forward() -> Tensor:
        logits: Tensor = network(images)
        return logits

    def ours() -> Tensor:
        output = model(images)
        return grad_cam(output.logits, output.features, alpha=output.alpha)

    def pytorch_grad_cam(watched: HookableNetwork, given: Tensor) -> Callable[[], Tensor]:
        cam = PytorchGradCAM(model=watched, target_layers=[watched.target])
        return lambda: torch.from_numpy(cam(input_tensor=given, targets=None))

    torch_cam_network = hookable(frozen=False)
    extractor = TorchCAM(torch_cam_network, torch_cam_network.target)

    def torch_cam() -> Tensor:
        scores = torch_cam_network(images)
        maps: Tensor = extractor(scores.argmax(1).tolist(), scores)[0]
        return maps

    captum_network = hookable(frozen=True)
    layer_grad_cam = LayerGradCam(captum_network, captum_network.target)
    predicted = forward().argmax(1)

    def captum() -> Tensor:
        maps: Tensor = layer_grad_cam.attribute(images, target=predicted, relu_attributions=True)
        return maps[:, 0]

    return {
        FORWARD: forward,
        OURS: ours,
        OURS_RESIZED: lambda: normalize_maps(resize_maps(ours(), (images.shape[2], images.shape[3]))),
        TORCH_CAM: torch_cam,
        CAPTUM: captum,
        PYTORCH_GRAD_CAM: pytorch_grad_cam(hookable(frozen=False), images),
        PYTORCH_GRAD_CAM_FROZEN: pytorch_grad_cam(hookable(frozen=True), images.clone().requires_grad_()),
    }


def _agreements(name: str, variants: Variants) -> dict[str, Agreement]:
    """Of each library's maps with this package's of the same size; ends the program where they differ."""
    found = {}
    for ours in (OURS, OURS_RESIZED):
        maps = variants[ours]()
        for library in COMPARISONS[ours]:
            try:
                found[library] = agreement(maps, variants[library]().to(maps.device))
            except ValueError as error:
                raise SystemExit(f"error: {name}, {library}: {error}; nothing was timed") from error
            correlation, compared, constant = found[library]
            print(f"{name}, {library}: maps correlated ≥ {correlation:.6f} ({compared} images, {constant} constant)")
    return found


def agreement(ours: Tensor, theirs: Tensor) -> Agreement:
    """Compare maps (N, H, W) image by image.

    A constant map has no correlation. Where both are constant they agree, and are counted; where one alone is,
    they do not.

    Raises:
        ValueError: the maps are not the same, or all of them are constant.
    """
    varies, theirs_varies = (normalize_maps(maps).flatten(1).any(1) for maps in (ours, theirs))
    odd = int((varies != theirs_varies).sum())
    if odd:
        raise ValueError(f"{odd} of {len(ours)} images have one constant map and one that is not")
    if not varies.any():
        raise ValueError("all maps are constant: there is nothing to compare")
    ours, theirs = (maps[varies].flatten(1).double() for maps in (ours, theirs))
    correlations = F.cosine_similarity(ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True))
    lowest = correlations.min().item()
    if not lowest >= MIN_CORRELATION:
        raise ValueError(f"an image's maps are correlated by {lowest:.6f}, less than {MIN_CORRELATION}")
    return Agreement(lowest, int(varies.sum()), int((~varies).sum()))


if __name__ == "__main__":
    main()
