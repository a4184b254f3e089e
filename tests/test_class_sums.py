"""Class CAMs against a loop over classes, straight from eq. 3-5."""

import oracles
import pytest
import torch
from oracles import TinyNet, sample_batch
from torch import Tensor
from torch.testing import assert_close

from distributed_batchcam import class_cams, grad_cam
from distributed_batchcam.cam import channel_weights
from distributed_batchcam.class_sums import ClassSums, cams_of_sums, count_by_class, sum_by_class

EXACT = {"rtol": 1e-12, "atol": 1e-12}
REDUCTIONS = ["factored", "sums", "local"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("head", ["pool", "flat"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_class_maps_are_those_of_a_loop_over_classes(
    reduction: str, head: str, normalize: bool, in_chans: int, device: torch.device
) -> None:
    model = TinyNet(in_chans=in_chans, head=head).double()
    images, targets, _ = sample_batch(in_chans=in_chans)
    expected = oracles.class_cams(model, images, targets, 5, normalize)
    assert sum(bool(cam.any()) for cam in expected.values()) > 2, "too many empty maps to tell anything"

    logits, features = model.to(device)(images.to(device))
    maps, counts = class_cams(logits, features, targets.to(device), 5, reduction=reduction, normalize=normalize)
    assert counts.tolist() == torch.bincount(targets, minlength=5).tolist()
    for c in range(5):
        assert_close(maps[c].cpu(), expected.get(c, torch.zeros(5, 5, dtype=torch.float64)), **EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_absent_class_has_a_map_of_zeros_and_no_sample(reduction: str) -> None:
    images, _, _ = sample_batch()
    logits, features = TinyNet().double()(images)
    targets = torch.tensor([0, 0, 2, 2, 2, 4, 4])
    maps, counts = class_cams(logits, features, targets, 5, reduction=reduction)
    assert counts.tolist() == [2, 0, 3, 0, 2]
    assert not maps[[1, 3]].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_image_is_its_class_s_map(reduction: str) -> None:
    logits, features = TinyNet().double()(sample_batch()[0][:1])
    maps, counts = class_cams(logits, features, torch.tensor([3]), 5, reduction=reduction)
    assert_close(maps[3], grad_cam(logits, features, torch.tensor([3]))[0], **EXACT)
    assert maps[3].any()
    assert counts.tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batch_of_one_class_only(reduction: str) -> None:
    model, images = TinyNet().double(), sample_batch()[0]
    targets = torch.full((7,), 1)
    maps, counts = class_cams(*model(images), targets, 5, reduction=reduction)
    assert_close(maps[1], oracles.class_cams(model, images, targets, 5)[1], **EXACT)
    assert maps[1].any()
    assert counts.tolist() == [0, 7, 0, 0, 0]
    assert not maps[[0, 2, 3, 4]].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_model_of_a_single_class(reduction: str) -> None:
    model, images = TinyNet(num_classes=1).double(), sample_batch()[0]
    targets = torch.zeros(7, dtype=torch.int64)
    maps, _ = class_cams(*model(images), targets, 1, reduction=reduction)
    assert_close(maps[0], oracles.class_cams(model, images, targets, 1)[0], **EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_image_gives_maps_of_zeros(reduction: str) -> None:
    logits, features = TinyNet().double()(torch.empty(0, 1, 10, 10, dtype=torch.float64))
    targets = torch.empty(0, dtype=torch.int64)
    maps, counts = class_cams(logits, features, targets, 5, reduction=reduction, create_graph=True)
    assert maps.shape == (5, 5, 5)
    assert not maps.any()
    assert not counts.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_by_one_features(reduction: str) -> None:
    features = torch.rand(4, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 3, dtype=torch.float64)
    logits = features.flatten(1) @ weight.T
    targets = torch.tensor([0, 0, 1, 1])
    raw, _ = class_cams(logits, features, targets, 2, reduction=reduction, normalize=False)
    expected = torch.stack([(weight[c] * features[targets == c].mean(0).flatten()).sum() for c in (0, 1)])
    assert_close(raw.flatten(), expected.detach(), **EXACT)
    assert not class_cams(logits, features, targets, 2, reduction=reduction).maps.any()


def test_class_map_is_not_the_mean_of_its_images_maps() -> None:
    logits, features = TinyNet(head="pool").double()(sample_batch()[0])
    targets = torch.zeros(7, dtype=torch.int64)
    of_class = class_cams(logits, features, targets, 5, normalize=False).maps[0]
    assert not torch.allclose(of_class, grad_cam(logits, features, targets, normalize=False).mean(0))


def test_order_of_the_images_does_not_matter() -> None:
    model = TinyNet().double()
    images, targets, _ = sample_batch()
    order = torch.randperm(7)
    maps = class_cams(*model(images), targets, 5).maps
    assert_close(class_cams(*model(images[order]), targets[order], 5).maps, maps, **EXACT)


def test_sums_add_up_over_batches() -> None:
    model = TinyNet().double()
    images, targets, _ = sample_batch()

    def sums(part: slice) -> ClassSums:
        logits, features = model(images[part])
        weights = channel_weights(logits, features, targets[part])
        by_class = [sum_by_class(values, targets[part], 5) for values in (weights, features.detach())]
        return ClassSums(count_by_class(targets[part], 5).double(), *by_class)

    parts = [sums(slice(0, 2)), sums(slice(2, 6)), sums(slice(6, 7))]
    total = ClassSums(*(sum(kind) for kind in zip(*parts, strict=True)))
    logits, features = model(images)
    expected = class_cams(logits, features, targets, 5, normalize=False)
    assert_close(cams_of_sums(total).maps, expected.maps, **EXACT)
    assert torch.equal(total.counts, expected.counts)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sums_by_class_and_their_gradients_are_those_of_a_loop(memory_format: torch.memory_format) -> None:
    values = torch.randn(7, 4, 5, 6, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    targets = torch.tensor([0, 2, 2, 4, 0, 2, 2])
    sums = sum_by_class(values, targets, 5)
    assert_close(sums, torch.stack([values[targets == c].sum(0) for c in range(5)]), **EXACT)
    upstream = torch.randn(5, 4, 5, 6, dtype=torch.float64).to(memory_format=memory_format)
    (gradient,) = torch.autograd.grad(sums, values, upstream)
    assert torch.equal(gradient, torch.stack([upstream[c] for c in targets.tolist()]))
    assert gradient.is_contiguous(memory_format=memory_format), "in the order of what it is added to"
    assert not gradient._is_view(), "autograd adds to it in place"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("head", ["pool", "flat"])
def test_closed_form_alpha_gives_the_same_maps_and_gradients(reduction: str, head: str) -> None:
    model = TinyNet(head=head).double()
    images, targets, _ = sample_batch()
    goal = torch.rand(5, 5, 5, dtype=torch.float64)

    def run(with_alpha: bool) -> list[Tensor]:
        features = model.backbone(images)
        maps, _ = class_cams(
            model.head(features),
            features,
            targets,
            5,
            reduction=reduction,
            create_graph=True,
            alpha=model.alpha(features) if with_alpha else None,
        )
        weights = [*model.backbone.parameters(), model.fc1.weight, model.fc2.weight]
        return [maps, *torch.autograd.grad((maps - goal).square().sum(), weights)]

    for closed_form, general in zip(run(True), run(False), strict=True):
        assert general.any()
        assert_close(closed_form, general, **EXACT)


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_maps_carry_a_graph_only_when_asked_for_and_counts_never(reduction: str, create_graph: bool) -> None:
    images, targets, _ = sample_batch()
    cams = class_cams(*TinyNet().double()(images), targets, 5, reduction=reduction, create_graph=create_graph)
    assert cams.maps.requires_grad == create_graph
    assert not cams.counts.requires_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_are_float32_or_better(reduction: str, dtype: torch.dtype, device: torch.device) -> None:
    images, targets, _ = (tensor.to(device) for tensor in sample_batch())
    model = TinyNet(head="pool").to(device)
    expected = class_cams(*model.double()(images), targets, 5, normalize=False).maps
    maps, _ = class_cams(*model.to(dtype)(images.to(dtype)), targets, 5, reduction=reduction, normalize=False)
    assert maps.dtype == torch.float32
    tolerance = 20 * torch.finfo(dtype).eps * expected.max().item()
    assert_close(maps.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_under_autocast_maps_are_float32_and_differentiable(reduction: str, device: torch.device) -> None:
    images, targets, _ = (tensor.to(device) for tensor in sample_batch())
    model = TinyNet().to(device)
    expected = class_cams(*model(images.float()), targets, 5).maps
    with torch.autocast(device.type, torch.bfloat16):
        maps, _ = class_cams(*model(images.float()), targets, 5, reduction=reduction, create_graph=True)
    assert maps.dtype == torch.float32
    assert_close(maps, expected, rtol=0, atol=0.1)
    maps.square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.backbone.parameters())
    assert model.backbone[0].weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_any_integer_type_names_a_target(dtype: torch.dtype) -> None:
    images, targets, _ = sample_batch()
    logits, features = TinyNet().double()(images)
    expected = class_cams(logits, features, targets, 5)
    assert torch.equal(class_cams(logits, features, targets.to(dtype), 5).maps, expected.maps)


@pytest.mark.parametrize(
    ("targets", "num_classes", "message"),
    [
        (torch.tensor([0, 1, 5]), 5, "targets must lie in 0 … 4, got values from 0 to 5"),
        (torch.tensor([0, 1, 3]), 3, "targets must lie in 0 … 2, got values from 0 to 3"),
        (torch.tensor([0, 1, 5]), 9, "targets must lie in 0 … 4, got values from 0 to 5"),
        (torch.tensor([-1, 1, 2]), 5, "targets must lie in 0 … 4, got values from -1 to 2"),
        (torch.tensor([0.0, 1, 2]), 5, "targets must be integers, got torch.float32"),
        (torch.tensor([0, 1]), 5, r"targets must have shape \(3,\), got \(2,\)"),
    ],
)
def test_bad_targets_are_named(targets: Tensor, num_classes: int, message: str) -> None:
    logits, features = TinyNet()(torch.rand(3, 1, 10, 10))
    with pytest.raises(ValueError, match=message):
        class_cams(logits, features, targets, num_classes)


def test_unknown_reduction_is_named() -> None:
    logits, features = TinyNet()(torch.rand(3, 1, 10, 10))
    with pytest.raises(ValueError, match="reduction must be one of factored, sums, local, got 'mean'"):
        class_cams(logits, features, torch.tensor([0, 1, 2]), 5, reduction="mean")


def test_features_that_the_logits_do_not_come_from_are_named() -> None:
    logits, features = TinyNet()(torch.rand(3, 1, 10, 10))
    with pytest.raises(ValueError, match="features are not in the autograd graph of the logits"):
        class_cams(logits, features.clone(), torch.tensor([0, 1, 2]), 5)
    with torch.no_grad():
        logits, features = TinyNet()(torch.rand(3, 1, 10, 10))
    with pytest.raises(ValueError, match="no autograd graph"):
        class_cams(logits, features, torch.tensor([0, 1, 2]), 5)
