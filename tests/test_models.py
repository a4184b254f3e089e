"""Models: exact sizes, feature maps of every layout, α of heads, weights, and errors."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from distributed_batchcam import create_model, grad_cam
from distributed_batchcam.cam import channel_weights
from distributed_batchcam.class_sums import SummedAlpha, class_weights
from distributed_batchcam.errors import InputError
from distributed_batchcam.heads import MeanPooling, find_mean_pooling
from distributed_batchcam.models import CAMModel, LayerModel, SplitModel, count_gflops, count_parameters


def images_for(size: int, channels: int = 1) -> Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("name", "parameters", "gflops", "map_at_28", "map_at_112"),
    [
        ("simple_cnn", 421_642, 0.0042, 14, 56),
        ("resnet18", 11_172_810, 0.456, 4, 14),
        ("convnextv2_tiny", 27_871_114, 0.828, 3, 13),
    ],
)
def test_paper_models_have_the_papers_size(
    name: str, parameters: int, gflops: float, map_at_28: int, map_at_112: int
) -> None:
    model = create_model(name)
    assert count_parameters(model) == parameters
    assert round(count_gflops(model, 1, 28), 4 if gflops < 0.1 else 3) == gflops
    assert model(images_for(28)).features.shape[2:] == (map_at_28, map_at_28)
    assert model(images_for(28)).logits.shape == (3, 10)
    if name != "simple_cnn":  # whose linear layer depends on the image size
        assert model(images_for(112)).features.shape[2:] == (map_at_112, map_at_112)
    else:
        assert create_model(name, image_size=112)(images_for(112)).features.shape[2:] == (map_at_112, map_at_112)


def test_convnext_without_its_bare_parameters_has_the_figure_that_the_paper_prints() -> None:
    model = create_model("convnextv2_tiny")
    bare = sum(p.numel() for name, p in model.named_parameters() if ".grn." in name)
    assert round((count_parameters(model) - bare) / 1e6, 2) == 27.82


TIMM_MODELS = [
    ("efficientnet_b0", 64),
    ("mobilenetv3_small_100", 64),
    ("regnety_002", 64),
    ("vit_tiny_patch16_224", 64),
    ("deit_tiny_patch16_224", 64),
    ("swin_tiny_patch4_window7_224", 224),
    ("mixer_s32_224", 224),
    ("cait_xxs24_224", 224),
]


@pytest.mark.parametrize(("name", "size"), TIMM_MODELS)
def test_any_timm_model_gives_maps_that_its_logits_depend_on(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=4, in_chans=3, image_size=size).eval()
    images = images_for(size, 3)
    if isinstance(model, SplitModel) and name.startswith("mixer"):
        nn.init.normal_(model.network.head.weight)  # type: ignore[union-attr, arg-type]  # timm starts it at zero
    output = model(images)
    assert output.features.shape[0] == 3
    assert output.features.ndim == 4
    assert output.features.shape[2] == output.features.shape[3] > 1
    maps = grad_cam(output.logits, output.features, create_graph=True)
    assert maps.amax((1, 2)).min() > 0.99
    # Training on the maps needs the second derivative, attention after the target layer included.
    maps.square().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(model.network(images), output.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18", "convnextv2_tiny", "swin_tiny_patch4_window7_224"])
def test_the_heads_alpha_equals_autograds_in_both_orders(name: str) -> None:
    size = 224 if name.startswith("swin") else 28
    torch.manual_seed(0)
    model = create_model(name, image_size=size, in_chans=1).double().eval()
    classes = torch.tensor([1, 5, 9])
    results = []
    for closed_form in (False, True):
        output = model(images_for(size).double())
        assert output.alpha is not None
        weights = channel_weights(
            output.logits,
            output.features,
            classes,
            alpha=output.alpha if closed_form else None,
            create_graph=True,
        )
        scalar = (weights * weights.detach().sin()).sum()
        gradients = torch.autograd.grad(scalar, list(model.parameters()), materialize_grads=True)
        results.append((weights, gradients))
    (by_autograd, first), (by_head, second) = results
    torch.testing.assert_close(by_head, by_autograd, rtol=1e-10, atol=1e-14)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18"])
@pytest.mark.parametrize("targets", [[1, 5, 1], [9, 9, 9]], ids=str)
def test_the_heads_sums_of_alpha_by_class_are_the_sums_in_both_orders(name: str, targets: list[int]) -> None:
    torch.manual_seed(0)
    model, classes = create_model(name).double().eval(), torch.tensor(targets)
    results = []
    for closed_form in (False, True):
        output = model(images_for(28).double())
        assert isinstance(output.alpha, SummedAlpha)
        alpha = output.alpha if closed_form else None
        sums = class_weights(output.logits, output.features, classes, 10, alpha=alpha, create_graph=True)
        scalar = (sums * sums.detach().sin()).sum()
        results.append((sums, torch.autograd.grad(scalar, list(model.parameters()), materialize_grads=True)))
    (by_autograd, first), (by_head, second) = results
    assert by_autograd.any(1).sum() == len(set(targets))
    torch.testing.assert_close(by_head, by_autograd, rtol=1e-10, atol=1e-14)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-13)


def test_a_head_that_mixes_positions_is_not_taken_for_mean_pooling() -> None:
    torch.manual_seed(0)
    model = create_model("vgg11", in_chans=3, image_size=64)
    assert isinstance(model, SplitModel)
    assert model.mean_pooling is None
    assert model(images_for(64, 3)).alpha is None


@pytest.mark.parametrize(
    ("name", "linear"),
    [("resnet18", "fc"), ("densenet121", "classifier"), ("convnextv2_tiny", None), ("mobilenetv3_small_050", None)],
)
def test_one_linear_layer_after_the_pooling_is_found_by_name(name: str, linear: str | None) -> None:
    model = create_model(name, in_chans=3, image_size=64)
    assert isinstance(model, SplitModel)
    assert model.mean_pooling == MeanPooling(linear)


def test_dropout_before_the_linear_layer_leaves_alpha_to_autograd() -> None:
    torch.manual_seed(0)
    network = create_model("resnet18").network.eval()
    network.drop_rate = 0.5  # read by timm's forward_head in training mode
    features = torch.rand(2, 512, 4, 4)
    before = torch.random.get_rng_state()
    assert find_mean_pooling(network, network.forward_head, features, [network.fc]) == MeanPooling(None)
    assert torch.equal(torch.random.get_rng_state(), before), "the trial draws nothing from the global generator"
    assert not network.training
    network.drop_rate = 0.0
    assert find_mean_pooling(network, network.forward_head, features, [network.fc]) == MeanPooling("fc")


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18"])
def test_a_closed_form_alpha_needs_no_graph(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name).eval()
    with torch.inference_mode():
        bare = model(images_for(28))
        maps = grad_cam(bare.logits, bare.features, alpha=bare.alpha)
    output = model(images_for(28))
    torch.testing.assert_close(maps, grad_cam(output.logits, output.features))


def test_a_loaded_model_takes_alpha_from_the_weights_it_has_now() -> None:
    torch.manual_seed(0)
    model, classes = create_model("resnet18").eval(), torch.tensor([1, 5, 9])
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.network.fc.weight.mul_(2)
    for each in (model, copied):
        output = each(images_for(28))
        weights = channel_weights(output.logits, output.features, classes, alpha=output.alpha)
        torch.testing.assert_close(weights, channel_weights(output.logits, output.features, classes))


def test_simple_cnn_takes_an_odd_feature_map() -> None:
    torch.manual_seed(0)
    model = create_model("simple_cnn", image_size=30).double()  # maps of 15×15, pooled to 7×7
    output = model(images_for(30).double())
    classes = torch.tensor([0, 1, 2])
    by_head = channel_weights(output.logits, output.features, classes, alpha=output.alpha)
    torch.testing.assert_close(by_head, channel_weights(output.logits, output.features, classes))


def test_simple_cnn_is_the_papers_layers_in_the_papers_order() -> None:
    """Convolution, ReLU, max-pool: pooled first the ReLU has less to do, and nothing else changes, to the last bit."""
    torch.manual_seed(0)
    network, images = create_model("simple_cnn").network, images_for(28)
    pooled = F.max_pool2d(network.conv1(images).relu(), 2)
    hidden = network.fc1(F.max_pool2d(network.conv2(pooled).relu(), 2).flatten(1)).relu()
    expected, found = network.fc2(hidden), network(images)
    assert torch.equal(found, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(logits.square().sum(), list(network.parameters())) for logits in (found, expected)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_target_layer_by_name_leaves_the_logits_unchanged() -> None:
    torch.manual_seed(0)
    default = create_model("resnet18").eval()
    named = create_model("resnet18", target_layer="layer2").eval()
    assert isinstance(named, LayerModel)
    named.load_state_dict(default.state_dict())
    images = images_for(28)
    torch.testing.assert_close(named(images).logits, default(images).logits)
    assert named(images).features.shape[1:] == (128, 14, 14)


def test_named_last_layer_equals_the_default_target() -> None:
    torch.manual_seed(0)
    default = create_model("resnet18").eval()
    named = create_model("resnet18", target_layer="layer4").eval()
    named.load_state_dict(default.state_dict())
    images, classes = images_for(28), torch.tensor([1, 2, 3])
    a, b = default(images), named(images)
    torch.testing.assert_close(grad_cam(a.logits, a.features, classes), grad_cam(b.logits, b.features, classes))


def test_frozen_model_still_explains() -> None:
    model = create_model("resnet18").requires_grad_(False).eval()
    output = model(images_for(28))
    assert grad_cam(output.logits, output.features).shape == (3, 4, 4)


def test_creating_a_model_depends_on_the_seed_alone_and_draws_nothing_more_than_its_weights() -> None:
    torch.manual_seed(3)
    first = create_model("simple_cnn")
    after_first = torch.rand(1)
    torch.manual_seed(3)
    second = create_model("simple_cnn", target_layer=None)
    assert torch.equal(torch.rand(1), after_first)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bf16_backbone_leaves_logits_and_features_in_float32() -> None:
    for model in (create_model("resnet18"), create_model("resnet18", target_layer="layer3")):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images_for(28))
            maps = grad_cam(output.logits, output.features)
        assert output.logits.dtype == output.features.dtype == maps.dtype == torch.float32


@pytest.mark.slow
def test_compiled_backbone_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = create_model("simple_cnn")
        if compiled:
            model.compile_backbone()
        output = model(images_for(28))
        maps = grad_cam(output.logits, output.features, create_graph=True, alpha=output.alpha)
        (output.logits.square().mean() + maps.square().mean()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Weights ---------------------------------------------------------------------------------------------


def test_own_weights_file_is_loaded_exactly(tmp_path: Path) -> None:
    model = create_model("simple_cnn")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = create_model("simple_cnn", pretrained=tmp_path / "model.safetensors")
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_timm_weights_file_is_adapted_to_channels_and_classes(tmp_path: Path) -> None:
    import timm

    published = timm.create_model("resnet18", num_classes=1000, in_chans=3)
    save_file(published.state_dict(), tmp_path / "weights.safetensors")
    model = create_model("resnet18", 4, 1, 128, pretrained=tmp_path / "weights.safetensors")
    torch.testing.assert_close(
        model.get_parameter("network.layer1.0.conv1.weight"), published.get_parameter("layer1.0.conv1.weight")
    )
    # timm sums the stem over colours for a single channel.
    torch.testing.assert_close(
        model.get_parameter("network.conv1.weight"), published.get_parameter("conv1.weight").sum(1, keepdim=True)
    )


def test_pickled_code_in_a_weights_file_is_refused_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (marker.write_text, ("x",))

    torch.save({"weight": Evil()}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="not a readable weights file"):
        create_model("simple_cnn", pretrained=tmp_path / "weights.pt")
    assert not marker.exists()


def test_weights_of_another_model_name_the_tensor_that_does_not_fit(tmp_path: Path) -> None:
    save_file(create_model("simple_cnn", num_classes=3).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"network\.fc2\.bias has shape \(3,\), this model needs \(10,\)"):
        create_model("simple_cnn", pretrained=tmp_path / "model.safetensors")
    save_file(create_model("resnet18").state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(InputError, match="weights of another model"):
        create_model("simple_cnn", pretrained=tmp_path / "resnet.safetensors")


# Errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnt18"}, "unknown model 'resnt18'; did you mean resnet18"),
        (
            {"name": "resnet18", "target_layer": "layr4"},
            "unknown target layer of resnet18 'layr4'; did you mean layer4",
        ),
        ({"name": "resnet18", "target_layer": "fc"}, "layer 'fc' gives"),
        ({"name": "convnextv2_tiny", "image_size": 8}, "convnextv2_tiny cannot take 8×8 images"),
        ({"name": "simple_cnn", "image_size": 3}, "at least 4×4 pixels"),
        ({"name": "simple_cnn", "pretrained": True}, "no published weights"),
        ({"name": "simple_cnn", "pretrained": "nowhere.safetensors"}, "no weights file nowhere.safetensors"),
        ({"name": "resnet18", "pretrained": True}, "small stem"),
        ({"name": "simple_cnn", "num_classes": 0}, "must be positive"),
        (
            {"name": "vit_tiny_patch16_224", "target_layer": "norm", "image_size": 64, "in_chans": 3},
            "do not influence its logits",
        ),
    ],
)
def test_bad_requests_name_the_matter(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        create_model(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_network_for_published_weights_is_one_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*arguments: Any, **options: Any) -> None:
        raise OSError("no network\nwhatever else")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"could not be had \(no network\); give a file instead") as caught:
        create_model("resnet18", in_chans=3, image_size=224, pretrained=True)
    assert "\n" not in str(caught.value)


def test_compiling_with_a_named_layer_is_refused() -> None:
    model: CAMModel = create_model("resnet18", target_layer="layer2")
    with pytest.raises(InputError, match="--compile needs the default target layer"):
        model.compile_backbone()


def test_fused_attention_before_the_target_can_be_differentiated_twice_where_that_is_allowed() -> None:
    def second_gradient(model: CAMModel) -> Tensor:
        images = images_for(64).requires_grad_()
        (gradient,) = torch.autograd.grad(model(images).logits.square().sum(), images, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), images)[0]

    model = create_model("vit_tiny_patch16_224", image_size=64)
    before = model(images_for(64)).logits
    with pytest.raises(RuntimeError, match="not implemented"):
        second_gradient(model)
    model.allow_double_backward()
    assert second_gradient(model).any()
    torch.testing.assert_close(model(images_for(64)).logits, before)
