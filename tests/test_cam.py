"""Grad-CAM against a loop over images with a full backward hook."""

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import TinyNet, sample_batch
from torch import Tensor
from torch.testing import assert_close

from distributed_batchcam import grad_cam
from distributed_batchcam.cam import channel_weights, normalize_maps, weighted_activations

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("head", ["pool", "flat"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("cam_class", ["predicted", "target"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_maps_are_those_of_a_hook_and_a_loop(
    head: str, normalize: bool, cam_class: str, in_chans: int, device: torch.device
) -> None:
    model = TinyNet(in_chans=in_chans, head=head).double()
    images, targets, _ = sample_batch(in_chans=in_chans)
    classes = targets if cam_class == "target" else None
    expected = oracles.grad_cams(model, images, classes, normalize)
    assert expected.any(dim=(1, 2)).sum() > 2, "too many empty maps to tell anything"

    logits, features = model.to(device)(images.to(device))
    maps = grad_cam(logits, features, None if classes is None else classes.to(device), normalize=normalize)
    assert_close(maps.cpu(), expected, **EXACT)


def test_predicted_and_target_class_differ_where_the_prediction_is_wrong() -> None:
    logits, features = TinyNet().double()(sample_batch()[0])
    predicted = logits.argmax(1)
    assert torch.equal(grad_cam(logits, features), grad_cam(logits, features, predicted))
    wrong = (predicted + 1) % logits.shape[1]
    assert not torch.allclose(grad_cam(logits, features), grad_cam(logits, features, wrong))


@pytest.mark.parametrize("head", ["pool", "flat"])
def test_an_image_alone_has_the_map_it_has_in_a_batch(head: str) -> None:
    model, images = TinyNet(head=head).double(), sample_batch()[0]
    logits, features = model(images)
    assert len(logits.argmax(1).unique()) > 1
    alone = torch.cat([grad_cam(*model(image[None])) for image in images])
    assert_close(grad_cam(logits, features), alone, **EXACT)


def test_no_image_gives_no_map() -> None:
    logits, features = TinyNet().double()(torch.empty(0, 1, 10, 10, dtype=torch.float64))
    assert grad_cam(logits, features, create_graph=True).shape == (0, 5, 5)


def test_one_by_one_features_are_constant_maps() -> None:
    features = torch.rand(3, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64)
    logits = features.flatten(1) @ weight.T
    raw = grad_cam(logits, features, normalize=False)
    expected = (weight[logits.argmax(1)] * features[:, :, 0, 0]).sum(1).relu()
    assert_close(raw[:, 0, 0], expected, **EXACT)
    assert not grad_cam(logits, features).any()


def test_memory_format_does_not_matter() -> None:
    model = TinyNet().double()
    features = model.backbone(sample_batch()[0])
    last = features.to(memory_format=torch.channels_last)
    assert_close(grad_cam(model.head(last), last), grad_cam(model.head(features), features), **EXACT)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_any_integer_type_names_a_class(dtype: torch.dtype) -> None:
    logits, features = TinyNet().double()(sample_batch()[0])
    classes = torch.tensor([4, 3, 2, 1, 0, 1, 2])
    assert torch.equal(grad_cam(logits, features, classes.to(dtype)), grad_cam(logits, features, classes))


# --- the graph ------------------------------------------------------------------------------------


def test_backbone_is_never_walked_for_a_map() -> None:
    model, walked = TinyNet().double(), []
    hidden = model.backbone[:2](sample_batch()[0])
    hidden.register_hook(lambda _gradient: walked.append("backbone"))
    features = model.backbone[2:](hidden)
    maps = grad_cam(model.head(features), features, create_graph=True)
    assert walked == []
    maps.sum().backward()
    assert walked == ["backbone"]


def test_maps_carry_a_graph_only_when_asked_for() -> None:
    logits, features = TinyNet().double()(sample_batch()[0])
    assert not grad_cam(logits, features).requires_grad
    assert grad_cam(logits, features, create_graph=True).requires_grad
    logits.sum().backward()  # The graph of the logits is still there.


def test_maps_are_differentiated_through_activations_and_weights() -> None:
    """∂M/∂A holds ᾱ (through A) and, for a head that is not linear, A·∂ᾱ/∂A (through α)."""
    model = TinyNet(head="pool").double()
    features = model.backbone(sample_batch(samples=2)[0]).detach().requires_grad_()

    def maps(features: Tensor) -> Tensor:
        return grad_cam(model.head(features), features, torch.tensor([1, 2]), create_graph=True)

    assert maps(features).any()
    assert torch.autograd.gradcheck(maps, features)


# --- α in closed form -----------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["pool", "flat"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_closed_form_alpha_gives_the_same_weights_maps_and_gradients(
    head: str, in_chans: int, device: torch.device
) -> None:
    model = TinyNet(in_chans=in_chans, head=head).double().to(device)
    images, targets, _ = (tensor.to(device) for tensor in sample_batch(in_chans=in_chans))
    target_maps = torch.rand(len(images), 5, 5, dtype=torch.float64, device=device)

    def run(with_alpha: bool) -> list[Tensor]:
        features = model.backbone(images)
        alpha = model.alpha(features) if with_alpha else None
        logits = model.head(features)
        weights = channel_weights(logits, features, targets, alpha=alpha)
        maps = grad_cam(logits, features, targets, alpha=alpha, create_graph=True)
        loss = (maps - target_maps).square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return [weights, maps.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]

    names = ["weights", "maps", *(name for name, _ in model.named_parameters())]
    # The last bias shifts no gradient, nor does one before a ReLU.
    without_gradient = {"fc2.bias"} if head == "pool" else {"fc1.bias", "fc2.bias"}
    for name, closed_form, general in zip(names, run(True), run(False), strict=True):
        assert general.any() != (name in without_gradient), name
        if name not in without_gradient:
            assert_close(closed_form, general, **EXACT)


def test_alpha_of_another_shape_is_named() -> None:
    logits, features = TinyNet()(torch.rand(3, 1, 10, 10))
    with pytest.raises(ValueError, match=r"alpha must give \(N, K\) = \(3, 6\), got \(6, 3\)"):
        grad_cam(logits, features, alpha=lambda classes: torch.zeros(6, 3))


# --- Σ_k w_k A_k ----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weighted_activations_and_their_gradients_are_those_of_a_plain_sum(memory_format: torch.memory_format) -> None:
    weights = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    features = torch.randn(3, 4, 5, 6, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    maps = weighted_activations(weights, features)
    assert_close(maps, (weights[:, :, None, None] * features).sum(1), **EXACT)
    assert torch.autograd.gradcheck(weighted_activations, (weights, features))
    (gradient,) = torch.autograd.grad(maps.square().sum(), features)
    assert gradient.is_contiguous(memory_format=memory_format), "in the order of what it is added to"
    assert not gradient._is_view(), "autograd adds to it in place"


def test_maps_are_in_full_float32_whatever_matrix_products_may_be() -> None:
    """`set_float32_matmul_precision` lets products be TF32 or bfloat16; a map and its gradient never are."""
    weights, features = torch.rand(4, 512, requires_grad=True), torch.rand(4, 512, 32, 32, requires_grad=True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        maps = weighted_activations(weights, features)
        gradients = torch.autograd.grad(maps.sum(), (weights, features))
        assert torch.get_float32_matmul_precision() == "medium", "as the user has set it"
    finally:
        torch.set_float32_matmul_precision(before)
    exact = (weights.double()[:, :, None, None] * features.double()).sum(1)
    assert_close(maps.double(), exact, rtol=1e-5, atol=0)
    assert_close(gradients[0].double(), features.detach().double().sum((2, 3)), rtol=1e-5, atol=0)


# --- normalisation --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.3, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_map_becomes_zeros_without_nan(value: float, dtype: torch.dtype, device: torch.device) -> None:
    maps = torch.rand(3, 4, 4, dtype=dtype, device=device)
    maps[1] = value
    maps.requires_grad_()
    normalized = normalize_maps(maps)
    normalized.square().sum().backward()
    assert not normalized[1].any()
    assert not maps.grad[1].any()
    assert normalized.isfinite().all()
    assert maps.grad.isfinite().all()
    assert maps.grad[0].any()
    assert maps.grad[2].any()


def test_map_that_the_relu_empties_becomes_zeros_without_nan() -> None:
    features = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0, 1, 1], [-1, -1, -1]], dtype=torch.float64, requires_grad=True)
    logits = features.mean((2, 3)) @ weight.T
    maps = grad_cam(logits, features, torch.tensor([0, 1]), create_graph=True)
    maps.sum().backward()
    assert maps[0].any()
    assert not maps[1].any()
    assert not features.grad[1].any()
    assert features.grad[0].any()
    assert weight.grad.isfinite().all()


def test_constant_positive_cam_becomes_zeros_though_rounding_makes_it_uneven() -> None:
    """Σ_k α_k A_k of constant channels, in an order that differs from pixel to pixel by an ulp."""
    maps = torch.full((1, 4, 4), 0.7, dtype=torch.float64)
    maps[0, ::2] *= 1 + 2 * torch.finfo(torch.float64).eps
    assert maps.max() > maps.min()
    assert not normalize_maps(maps).any()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scaling_the_features_changes_no_normalized_map(scale: float) -> None:
    weight = torch.randn(5, 4, dtype=torch.float64)
    features = torch.rand(3, 4, 6, 6, dtype=torch.float64)
    classes = torch.tensor([0, 1, 2])

    def maps(features: Tensor) -> Tensor:
        features = features.requires_grad_()
        return grad_cam(features.mean((2, 3)) @ weight.T, features, classes)

    assert maps(features).any()
    assert_close(maps(features.detach() * scale), maps(features), **EXACT)


@given(
    values=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    log_scale=st.integers(-60, 60),
)
def test_normalized_maps_span_zero_to_one_at_any_scale(values: list[float], log_scale: int) -> None:
    maps = torch.tensor(values, dtype=torch.float64).view(1, 2, 3)
    low, high = min(values), max(values)
    normalized = normalize_maps(maps * 2.0**log_scale)
    if high - low > 1e-12 * high and high - low > 1e-280:
        assert normalized.amin() == 0
        assert_close(normalized.amax(), torch.tensor(1.0, dtype=torch.float64), **EXACT)
        assert_close(normalized, (maps - low) / (high - low), **EXACT)
    assert normalized.isfinite().all()
    assert ((normalized >= 0) & (normalized <= 1)).all()


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_dtype", "map_dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_maps_are_float32_or_better(given_dtype: torch.dtype, map_dtype: torch.dtype, device: torch.device) -> None:
    images, targets, _ = sample_batch()
    expected = oracles.grad_cams(TinyNet(head="pool").double(), images, targets, normalize=False)
    model = TinyNet(head="pool").to(device, given_dtype)
    maps = grad_cam(*model(images.to(device, given_dtype)), targets.to(device), normalize=False)
    assert maps.dtype == map_dtype
    tolerance = 20 * torch.finfo(given_dtype).eps * expected.max().item()
    assert_close(maps.cpu().double(), expected, rtol=0, atol=tolerance)


def test_under_autocast_maps_are_float32_and_differentiable(device: torch.device) -> None:
    images, targets, _ = (tensor.to(device) for tensor in sample_batch())
    model = TinyNet(head="flat").to(device)
    expected = grad_cam(*model(images.float()), targets)
    with torch.autocast(device.type, torch.bfloat16):
        logits, features = model(images.float())
        assert features.dtype == torch.bfloat16
        maps = grad_cam(logits, features, targets, create_graph=True)
    assert maps.dtype == torch.float32
    assert_close(maps, expected, rtol=0, atol=0.1)
    maps.square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.backbone.parameters())
    assert model.backbone[0].weight.grad.any()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (torch.tensor([0, 1, 5]), "targets must lie in 0 … 4, got values from 0 to 5"),
        (torch.tensor([0, -1, 2]), "targets must lie in 0 … 4, got values from -1 to 2"),
        (torch.tensor([0.0, 1.0, 2.0]), "targets must be integers, got torch.float32"),
        (torch.tensor([True, False, True]), "targets must be integers, got torch.bool"),
        (torch.tensor([0, 1]), r"targets must have shape \(3,\), got \(2,\)"),
        (torch.tensor([[0, 1, 2]]), r"targets must have shape \(3,\), got \(1, 3\)"),
    ],
)
def test_bad_classes_are_named(classes: Tensor, message: str) -> None:
    logits, features = TinyNet()(torch.rand(3, 1, 10, 10))
    with pytest.raises(ValueError, match=message):
        grad_cam(logits, features, classes)


@pytest.mark.parametrize(
    ("logits", "features", "message"),
    [
        (torch.zeros(3), torch.zeros(3, 2, 4, 4), r"logits must have shape \(N, C\), got \(3,\)"),
        (torch.zeros(3, 5), torch.zeros(3, 2), r"features must have shape \(N, K, H, W\), got \(3, 2\)"),
        (torch.zeros(3, 5), torch.zeros(3, 0, 4, 4), "features must have at least one channel"),
        (torch.zeros(3, 5), torch.zeros(3, 2, 0, 4), "features must have at least one channel and position"),
        (torch.zeros(3, 5), torch.zeros(2, 2, 4, 4), "logits are of 3 samples, features of 2"),
        (torch.zeros(3, 5), torch.zeros(3, 2, 4, 4).long(), "must be floating point, got .*int64"),
    ],
)
def test_bad_shapes_and_types_are_named(logits: Tensor, features: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grad_cam(logits, features)


def test_missing_graph_is_named() -> None:
    with torch.no_grad():
        logits, features = TinyNet()(torch.rand(3, 1, 10, 10))
    with pytest.raises(ValueError, match=r"no autograd graph.*torch.no_grad"):
        grad_cam(logits, features)


def test_detached_features_are_named() -> None:
    logits, features = TinyNet()(torch.rand(3, 1, 10, 10))
    with pytest.raises(ValueError, match=r"no autograd graph.*detach"):
        grad_cam(logits, features.detach())


def test_features_that_the_logits_do_not_come_from_are_named() -> None:
    logits, features = TinyNet()(torch.rand(3, 1, 10, 10))
    with pytest.raises(ValueError, match="features are not in the autograd graph of the logits"):
        grad_cam(logits, features * 1)
