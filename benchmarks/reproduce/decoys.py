"""What is measured of a model that was trained on decoys, beside its summary: is it right for the right reasons?"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed_batchcam.checkpoint import load_run, write_atomic
from distributed_batchcam.data import Data, ImageSet, Loader, load_data, patches
from distributed_batchcam.data.decoys import with_other_patches
from distributed_batchcam.data.images import TensorImages
from distributed_batchcam.data.splits import balanced_selection
from distributed_batchcam.evaluation import evaluate
from distributed_batchcam.explainer import Explainer, frozen, maps_of
from distributed_batchcam.measures import BASIC, PATCH, Localization

UNBIASED = 500  # validation images whose patches say nothing
FILE = "decoys.json"
_BATCH = 500


def decoy_figures(path: Path, plain: str) -> dict[str, Any]:
    """Figures of a run on a decoy data set made of `plain`; measured once, and kept in the run directory.

    `valid_accuracy`, `valid_patch_mass`: on validation images, decoyed like the training set.
    `unbiased_valid_accuracy`: on 500 of them with patches that say nothing.
    `clean_test_accuracy`: on test images without patches.
    `wrong_reason`: the typology's score (Friedrich et al. 2023): share of a patch's pixels at which the map of the
    predicted class, positive part scaled to [0, 1], is above the mean of all maps; over the test set. Maps that are
    constant have no score: `dropped_maps` counts them.
    """
    file = path / FILE
    if file.is_file():
        return json.loads(file.read_text())
    run = load_run(path)
    explainer = Explainer(run.model, run.normalize)
    own, clean = (_data(name, run.config.valid_size, run.config.data_root) for name in (run.config.dataset, plain))
    prototypes = run.prototypes["valid"]

    def figures(images: ImageSet, *measures: Any) -> dict[str, Any]:
        return evaluate(
            explainer, Loader(images, _BATCH, torch.device("cpu")), prototypes, [*BASIC, *measures]
        ).figures()

    on_patches = Localization(PATCH, patches(own.valid))
    valid = figures(own.valid, on_patches)
    found = {
        "valid_accuracy": valid["accuracy"],
        "valid_patch_mass": valid["patch_mass"],
        "unbiased_valid_accuracy": figures(_unbiased(clean.valid))["accuracy"],
        "clean_test_accuracy": figures(clean.test)["accuracy"],
        **_wrong_reason(explainer, own.test),
    }
    write_atomic(file, json.dumps(found, indent=1).encode())
    return found


@cache
def _data(name: str, valid_size: int | None, root: Path | None) -> Data:
    return load_data(name, data_root=root, valid_size=valid_size)


def _unbiased(images: ImageSet) -> TensorImages:
    """The first validation images of every class, with patches as the test images have them."""
    assert isinstance(images, TensorImages)
    return with_other_patches(images.subset(balanced_selection(images.targets, UNBIASED)))


def _wrong_reason(explainer: Explainer, images: ImageSet) -> dict[str, float]:
    masks = patches(images)
    maps, inside = [], []
    with frozen(explainer.model):
        for batch in Loader(images, _BATCH, torch.device("cpu")).epoch():
            maps.append(maps_of(explainer(batch.images), None, images.shape[1:]))
            inside.append(masks(batch))
    return wrong_reason_score(torch.cat(maps), torch.cat(inside))


def wrong_reason_score(maps: Tensor, masks: Tensor) -> dict[str, float]:
    """Of maps (N, h, w) in [0, 1] and masks (N, h, w): the score in percent, and the number of constant maps."""
    seen = maps.amax((1, 2)) > 0
    maps, masks = maps[seen], masks[seen]
    above = (maps > maps.mean()) & masks
    shares = above.sum((1, 2)) / masks.sum((1, 2))
    return {"wrong_reason": 100 * float(shares.mean()), "dropped_maps": int((~seen).sum())}
