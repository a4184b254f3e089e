"""Accuracy and explanation quality of a model on an image set, exact over ranks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cam import channel_weights, normalize_maps, weighted_activations
from .class_sums import ClassSums, cams_of_sums
from .collectives import world_size
from .data import Data, Loader
from .distances import l1_distance, resize_maps, ssim
from .models import CAMModel


@dataclass(frozen=True)
class Evaluation:
    """Figures over an image set; explanation figures are of the target class's map."""

    samples: int
    accuracy: float  # percent
    loss: float  # mean cross-entropy
    cam_l1: float  # mean over images of mean |resize(M_i) - P[y_i]|
    cam_ssim: float  # mean over images of SSIM(resize(M_i), P[y_i])
    class_cam_ssim: float  # mean over present classes of SSIM(resize(M̄_c), P_c), M̄_c over the whole set
    class_maps: Tensor  # (C, h, w) resize(M̄_c), on the CPU

    def figures(self) -> dict[str, float]:
        """The numbers alone, by name."""
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "cam_l1": self.cam_l1,
            "cam_ssim": self.cam_ssim,
            "class_cam_ssim": self.class_cam_ssim,
        }


def evaluate(
    model: CAMModel,
    loader: Loader,
    data: Data,
    prototypes: Tensor,
    *,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Evaluation:
    """Evaluate a model in one pass: every sample counts once, whatever the number of ranks.

    Each rank adds up its own samples; one all-reduce at the end joins them. Distances to prototypes are what
    the objectives optimise, hence no independent evidence of right reasons.

    Args:
        model: put into eval mode; its mode is restored.
        loader: of the image set, without shuffling, this rank's share.
        data: for the normalisation of the images.
        prototypes: (C, h, w) on the model's device.
        autocast: makes the context for each forward pass.
    """
    size = (prototypes.shape[1], prototypes.shape[2])
    totals = torch.zeros(5, dtype=torch.float64, device=prototypes.device)
    sums: ClassSums | None = None
    was_training = model.training
    model.eval()
    with _frozen(model), torch.enable_grad():
        for batch in loader.epoch():
            with autocast():
                output = model(data.normalize(batch.images))
            weights = channel_weights(
                output.logits, output.features, batch.targets, channel_offset=output.channel_offset
            )
            features = output.features.detach()
            maps = normalize_maps(weighted_activations(weights, features).relu())
            maps = resize_maps(maps, size)
            targets = prototypes[batch.targets]
            logits = output.logits.detach()
            totals += torch.stack(
                [
                    totals.new_tensor(len(logits)),
                    (logits.argmax(1) == batch.targets).sum(),
                    F.cross_entropy(logits, batch.targets, reduction="sum"),
                    l1_distance(maps, targets).sum(),
                    ssim(maps, targets).sum(),
                ]
            )
            if sums is None:
                sums = _no_sums(len(prototypes), features)
            sums.counts.index_add_(0, batch.targets, sums.counts.new_ones(len(logits)))
            sums.weights.index_add_(0, batch.targets, weights.double())
            sums.features.index_add_(0, batch.targets, features.double())
    model.train(was_training)
    assert sums is not None, "a loader yields every global batch on every rank"
    totals, sums = _over_ranks(totals, sums)

    cams = cams_of_sums(sums)
    class_maps = resize_maps(normalize_maps(cams.maps), size)
    similarities = ssim(class_maps, prototypes.double())[cams.counts > 0]
    count, right, loss, l1, similarity = totals.tolist()
    return Evaluation(
        samples=round(count),
        accuracy=100 * right / count,
        loss=loss / count,
        cam_l1=l1 / count,
        cam_ssim=similarity / count,
        class_cam_ssim=similarities.mean().item(),
        class_maps=class_maps.float().cpu(),
    )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the weights: the graph then holds the head alone, from the features on."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _no_sums(num_classes: int, features: Tensor) -> ClassSums:
    """Sums in float64: over a whole set, float32 would show its rounding."""
    zeros = features.new_zeros((num_classes, *features.shape[1:]), dtype=torch.float64)
    return ClassSums(zeros[:, 0, 0, 0].clone(), zeros[:, :, 0, 0].clone(), zeros)


def _over_ranks(totals: Tensor, sums: ClassSums) -> tuple[Tensor, ClassSums]:
    if world_size() == 1:
        return totals, sums
    parts = [totals, *sums]
    flat = torch.cat([part.flatten() for part in parts])
    torch.distributed.all_reduce(flat)
    joined = [part.view_as(like) for part, like in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
    return joined[0], ClassSums(*joined[1:])
