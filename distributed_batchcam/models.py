"""Models that return logits *and* the feature maps that explain them: images -> (logits, features).

The paper's three models stand here exactly; every other name is timm's. To add one: register it with timm, or
give a builder a line in `_BUILDERS`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cam import Alpha
from .errors import InputError, unknown_name
from .heads import HeadOutput, HiddenAlpha, MeanPooling, SelfExplaining, find_mean_pooling

# Below this image size the paper's two timm models get its small stem, above it timm's own.
SMALL_STEM_BELOW = 128


class CAMOutput(NamedTuple):
    """What a model returns."""

    logits: Tensor  # (N, C), float32 or better
    features: Tensor  # (N, K, H, W), the very tensor from which the logits were computed
    alpha: Alpha | None = None  # see `cam.channel_weights`; None where the head does not know it


def create_model(
    name: str,
    num_classes: int = 10,
    in_chans: int = 1,
    image_size: int = 28,
    pretrained: bool | str | Path = False,
    target_layer: str | None = None,
) -> "CAMModel":
    """A classifier whose `module(images (N, in_chans, s, s))` has `.logits` (N, C) and `.features` (N, K, H, W).

    `simple_cnn`, `resnet18` and `convnextv2_tiny` are the paper's (below 128 pixels with its small stems);
    any other name is a timm model's.

    Args:
        name: model name.
        num_classes: C.
        in_chans: channels of the images.
        image_size: s, in pixels.
        pretrained: True downloads timm's weights; a path loads a file (safetensors, or a state dict of
            tensors alone), this project's own or one in timm's format.
        target_layer: name of the module whose output is explained. Default: the last feature map before
            pooling; for transformers that classify by a class token, the patch tokens that enter the
            last block. Token sequences become a grid, class and register tokens left out.

    Raises:
        InputError: unknown model or layer (with the nearest names), an image size that the model cannot
            take, weights that are missing or do not fit.
    """
    if num_classes < 1 or in_chans < 1 or image_size < 1:
        raise InputError(
            f"num_classes, in_chans and image_size must be positive, got {num_classes}, {in_chans}, {image_size}"
        )
    weights = None if isinstance(pretrained, bool) else _read_weights(Path(pretrained))
    own_format = weights is not None and all(key.startswith("network.") for key in weights)
    network = _build_network(
        name,
        num_classes,
        in_chans,
        image_size,
        pretrained=pretrained if not own_format else False,
    )
    model = _with_target(name, network, target_layer, (in_chans, image_size, image_size))
    if own_format:
        load_weights(model, cast(dict[str, Tensor], weights), str(pretrained))
    return model


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load a state dict whose names and shapes must all fit; `source` names it in the error."""
    own = model.state_dict()
    for key in sorted(own.keys() | weights.keys()):
        if key not in weights or key not in own:
            raise InputError(
                f"{source}: weights of another model ({'no' if key in own else 'unexpected'} tensor {key})"
            )
        if own[key].shape != weights[key].shape:
            raise InputError(
                f"{source}: {key} has shape {tuple(weights[key].shape)}, this model needs {tuple(own[key].shape)}"
            )
    model.load_state_dict(weights)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_gflops(model: nn.Module, in_chans: int, image_size: int) -> float:
    """Multiply-adds of one image's forward pass, in 10⁹ (the unit of the paper's tables)."""
    from torch.utils.flop_counter import FlopCounterMode

    first = next(model.parameters())
    image = torch.zeros(1, in_chans, image_size, image_size, device=first.device, dtype=first.dtype)
    was_training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    model.train(was_training)
    return counter.get_total_flops() / 2 / 1e9


class CAMModel(nn.Module):
    """A network (anything with `forward`) that also hands out the feature maps of its target layer."""

    def __init__(self, network: nn.Module, target_layer: str | None) -> None:
        super().__init__()
        self.network = network
        self.target_layer = target_layer

    def forward(self, images: Tensor) -> CAMOutput:
        raise NotImplementedError

    def allow_double_backward(self) -> None:
        """Make the whole network one that can be differentiated twice; what follows the target layer always is."""
        _allow_double_backward(self.network.modules())

    def compile_backbone(self) -> None:
        """Compile what runs before the target layer; double backward, which compiled code lacks, is after it."""
        raise NotImplementedError

    def __call__(self, images: Tensor) -> CAMOutput:  # typed for callers
        return cast(CAMOutput, super().__call__(images))


class SplitModel(CAMModel):
    """A network in two halves, `forward_features` (the backbone) and `forward_head`, as timm's are.

    The backbone may be compiled and run under autocast. The head runs eagerly in float32 or better: second
    order gradients exist only there.
    """

    def __init__(self, network: nn.Module, layout: "Layout") -> None:
        super().__init__(network, target_layer=None)
        self.layout = layout
        self._backbone: Callable[[Tensor], Tensor] = self._halves.forward_features
        self.mean_pooling: MeanPooling | None = None

    @property
    def _halves(self) -> Any:
        """The network, typed as what it is: something with `forward_features` and `forward_head`."""
        return self.network

    def compile_backbone(self) -> None:
        self._backbone = torch.compile(self._halves.forward_features)

    def forward(self, images: Tensor) -> CAMOutput:
        features = self.layout.to_maps(self._backbone(images))
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            _ensure_graph(features)
            return self.head(features)

    def head(self, features: Tensor) -> CAMOutput:
        """Features (N, K, H, W) to logits, with α where the head knows it."""
        if isinstance(self.network, SelfExplaining):
            logits, alpha = self.network.explained_head(features)
        elif self.mean_pooling is not None:
            logits, alpha = self.mean_pooling(self.network, self.forward_head, features)
        else:
            logits, alpha = self.forward_head(features), None
        return CAMOutput(logits, features, alpha)

    def forward_head(self, maps: Tensor) -> Tensor:
        """The network's own head, on maps (N, K, H, W)."""
        logits: Tensor = self._halves.forward_head(self.layout.from_maps(maps))
        return logits


class LayerModel(CAMModel):
    """A network explained at any module by name; its output is read as the forward pass goes by."""

    def __init__(self, network: nn.Module, target_layer: str, layout: "Layout") -> None:
        super().__init__(network, target_layer)
        self.layout = layout

    def compile_backbone(self) -> None:
        raise InputError(
            f"--compile needs the default target layer, not {self.target_layer!r}: "
            "only there is the network split in two"
        )

    def forward(self, images: Tensor) -> CAMOutput:
        seen: list[Tensor] = []

        def read(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            maps = self.layout.to_maps(output)
            maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
            _ensure_graph(maps)
            seen.append(maps)
            # The rest of the network must run on the tensor that is handed out, or no gradient reaches it.
            return self.layout.from_maps(maps, output).to(output.dtype)

        handle = self.network.get_submodule(cast(str, self.target_layer)).register_forward_hook(read)
        try:
            logits = self.network(images)
        finally:
            handle.remove()
        return CAMOutput(logits.to(torch.promote_types(logits.dtype, torch.float32)), seen[-1])


class Layout(NamedTuple):
    """How a layer arranges its output, and the way to (N, K, H, W) maps and back."""

    kind: Literal["nchw", "nhwc", "tokens"]
    prefix_tokens: int = 0
    grid: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, output: Any, network: nn.Module, layer: str) -> "Layout":
        """The layout of a layer's output, seen on one forward pass."""
        if isinstance(output, Tensor) and output.ndim == 4:
            _, rows, columns, last = output.shape
            square_first = rows == columns != last
            named = getattr(network, "output_fmt", None)
            return cls("nhwc" if square_first or (named == "NHWC" and rows == columns) else "nchw")
        if isinstance(output, Tensor) and output.ndim == 3:
            # Some networks add their class token late: the layer may not have it yet.
            for prefix in (int(getattr(network, "num_prefix_tokens", 0)), 0):
                side = round((output.shape[1] - prefix) ** 0.5)
                if side > 0 and side * side == output.shape[1] - prefix:
                    return cls("tokens", prefix, (side, side))
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"layer {layer!r} gives {shape}, not feature maps (N, K, H, W) or a square grid of tokens; "
            "choose a layer with --target-layer"
        )

    def to_maps(self, output: Tensor) -> Tensor:
        """A layer's output as (N, K, H, W)."""
        if self.kind == "nchw":
            return output
        if self.kind == "nhwc":
            return output.permute(0, 3, 1, 2)
        return output[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, self.grid)

    def from_maps(self, maps: Tensor, original: Tensor | None = None) -> Tensor:
        """Maps back in the layer's arrangement; `original` supplies the prefix tokens."""
        if self.kind == "nchw":
            return maps
        if self.kind == "nhwc":
            return maps.permute(0, 2, 3, 1)
        tokens = maps.flatten(2).transpose(1, 2)
        if original is None or not self.prefix_tokens:
            return tokens
        return torch.cat([original[:, : self.prefix_tokens].to(tokens.dtype), tokens], 1)


class SimpleCNN(nn.Module):
    """The paper's SimpleCNN: two 3×3 convolutions and two linear layers, 421,642 parameters at 28×28×1."""

    def __init__(self, num_classes: int = 10, in_chans: int = 1, image_size: int = 28) -> None:
        super().__init__()
        self.positions = (image_size // 4) ** 2
        if self.positions == 0:
            raise InputError(f"simple_cnn needs images of at least 4×4 pixels, got {image_size}×{image_size}")
        self.conv1 = nn.Conv2d(in_chans, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * self.positions, 128)
        self.fc2 = nn.Linear(128, num_classes)
        # He et al. 2015, for ReLU: after three epochs a quarter of a point ahead of torch's default on Fashion-MNIST.
        for layer in (self.conv1, self.conv2, self.fc1):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward_features(self, images: Tensor) -> Tensor:
        """(N, in_chans, s, s) to (N, 64, s/2, s/2)."""
        # Pooled before the ReLU rather than after it: the same values and gradients, of a quarter of the numbers.
        return F.relu(self.conv2(F.relu(F.max_pool2d(self.conv1(images), 2))))

    def forward_head(self, features: Tensor) -> Tensor:
        """(N, 64, s/2, s/2) to (N, C)."""
        return self.explained_head(features).logits

    def explained_head(self, features: Tensor) -> HeadOutput:
        """(N, 64, s/2, s/2) to logits (N, C) and their α."""
        first = self.fc1.weight.view(128, 64, self.positions)
        # Of this view, not of the parameter: autograd then adds α's gradient, the same at all positions, unexpanded.
        hidden = F.linear(F.max_pool2d(features, 2).flatten(1), first.flatten(1), self.fc1.bias)
        alpha = HiddenAlpha(hidden, first, self.fc2.weight, features.shape[2] * features.shape[3])
        return HeadOutput(self.fc2(F.relu(hidden)), alpha)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def _simple_cnn(num_classes: int, in_chans: int, image_size: int, pretrained: bool | str | Path) -> nn.Module:
    if pretrained:
        raise InputError(
            "simple_cnn has no published weights: leave --pretrained out, or name a model.safetensors of a run"
        )
    return SimpleCNN(num_classes, in_chans, image_size)


def _resnet18(num_classes: int, in_chans: int, image_size: int, pretrained: bool | str | Path) -> nn.Module:
    if image_size >= SMALL_STEM_BELOW:
        return _timm_model("resnet18", num_classes, in_chans, image_size, pretrained)
    _refuse_pretrained_small_stem("resnet18", image_size, pretrained)
    network = _timm_model("resnet18", num_classes, in_chans, image_size, False)
    network.conv1 = nn.Conv2d(in_chans, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm does
    network.maxpool = nn.Identity()
    return network


def _convnextv2_tiny(num_classes: int, in_chans: int, image_size: int, pretrained: bool | str | Path) -> nn.Module:
    if image_size >= SMALL_STEM_BELOW:
        return _timm_model("convnextv2_tiny", num_classes, in_chans, image_size, pretrained)
    _refuse_pretrained_small_stem("convnextv2_tiny", image_size, pretrained)
    network = _timm_model("convnextv2_tiny", num_classes, in_chans, image_size, False)
    stem = cast(nn.Sequential, network.stem)
    conv = nn.Conv2d(in_chans, cast(nn.Conv2d, stem[0]).out_channels, 4, stride=1)
    nn.init.trunc_normal_(conv.weight, std=0.02)  # as timm does
    nn.init.zeros_(cast(Tensor, conv.bias))
    stem[0] = conv
    return network


_Builder = Callable[[int, int, int, bool | str | Path], nn.Module]
_BUILDERS: dict[str, _Builder] = {
    "simple_cnn": _simple_cnn,
    "resnet18": _resnet18,
    "convnextv2_tiny": _convnextv2_tiny,
}
PAPER_MODELS = tuple(_BUILDERS)


def _refuse_pretrained_small_stem(name: str, image_size: int, pretrained: bool | str | Path) -> None:
    if pretrained:
        raise InputError(
            f"{name} below {SMALL_STEM_BELOW} pixels has the paper's small stem, for which there are no pretrained "
            f"weights: use --image-size {SMALL_STEM_BELOW} or more, or a tagged timm name such as resnet18.a1_in1k"
        )


def _build_network(
    name: str, num_classes: int, in_chans: int, image_size: int, pretrained: bool | str | Path
) -> nn.Module:
    if name in _BUILDERS:
        return _BUILDERS[name](num_classes, in_chans, image_size, pretrained)
    return _timm_model(name, num_classes, in_chans, image_size, pretrained)


def _timm_model(
    name: str, num_classes: int, in_chans: int, image_size: int, pretrained: bool | str | Path
) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise unknown_name("model", name, [*_BUILDERS, *timm.list_models()], "any model of timm, or simple_cnn")
    options: dict[str, Any] = {}
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        options["img_size"] = image_size
    if not isinstance(pretrained, bool):
        options["pretrained_cfg_overlay"] = {"file": str(pretrained), "custom_load": False}
    try:
        return timm.create_model(
            name, pretrained=bool(pretrained), num_classes=num_classes, in_chans=in_chans, **options
        )
    except OSError as error:
        raise InputError(
            f"the pretrained weights of {name} could not be had ({_first_line(error)}); "
            "give a file instead: --pretrained PATH"
        ) from error
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        wanted = f"with weights {pretrained} " if pretrained else ""
        raise InputError(
            f"{name} cannot be built {wanted}for {in_chans}×{image_size}×{image_size} images: {_first_line(error)}"
        ) from error


def _with_target(
    name: str, network: nn.Module, target_layer: str | None, image_shape: tuple[int, int, int]
) -> CAMModel:
    """Wrap a network, after a trial run on two random images: layout, image size and influence are checked."""
    was_training = network.training
    network.eval()
    # A generator of its own: the global one must not depend on what this trial draws.
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
    try:
        model = _trial(name, network, target_layer, images)
    finally:
        network.train(was_training)
    return model


def _trial(name: str, network: nn.Module, target_layer: str | None, images: Tensor) -> CAMModel:
    if target_layer is not None:
        return _layer_model(name, network, target_layer, images)
    with torch.no_grad(), _readable_failure(name, images):
        output = cast(Any, network).forward_features(images)
    layout = Layout.of(output, network, f"{name}.forward_features")
    if layout.prefix_tokens == 0:
        model = SplitModel(network, layout)
        with _record_calls(network) as calls, _readable_failure(name, images):
            model.head(layout.to_maps(output))
        _allow_double_backward(module for module, _ in calls)
        with _zeros_filled(network):
            modules = [module for module, _ in calls]
            model.mean_pooling = find_mean_pooling(network, model.forward_head, layout.to_maps(output), modules)
        return model
    # A class token feeds the head, not the patch tokens: explain those where they last matter, at the entry
    # of the last block.
    blocks = getattr(network, "blocks", None)
    last = f"blocks.{len(blocks) - 1}.norm1" if isinstance(blocks, nn.Sequential | nn.ModuleList) else ""
    if last not in dict(network.named_modules()):
        raise InputError(f"{name} has no default target layer: name one with --target-layer")
    return _layer_model(name, network, last, images)


def _layer_model(name: str, network: nn.Module, layer: str, images: Tensor) -> CAMModel:
    modules = dict(network.named_modules())
    if layer not in modules or not layer:
        raise unknown_name(
            f"target layer of {name}", layer, filter(None, modules), f"it has {len(modules) - 1} modules"
        )
    with torch.no_grad(), _record_calls(network) as calls, _readable_failure(name, images):
        network(images)
    positions = [index for index, (module, _) in enumerate(calls) if module is modules[layer]]
    if len(positions) != 1:
        raise InputError(
            f"target layer {layer!r} of {name} runs {len(positions)} times in a forward pass: it must run once"
        )
    _allow_double_backward(module for module, _ in calls[positions[0] + 1 :])
    model = LayerModel(network, layer, Layout.of(calls[positions[0]][1], network, layer))
    with _zeros_filled(network):
        result = model(images)
        (gradient,) = torch.autograd.grad(result.logits.sum(), result.features, allow_unused=True)
    if gradient is None or not bool(gradient.abs().max() > 0):
        raise InputError(
            f"the feature maps of layer {layer!r} of {name} do not influence its logits: choose an earlier layer"
        )
    return model


@contextmanager
def _readable_failure(name: str, images: Tensor) -> Iterator[None]:
    """What a network raises on images that are too small for it, as one line."""
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{name} cannot take {images.shape[2]}×{images.shape[3]} images: {_first_line(error)}; "
            "choose another --image-size"
        ) from error


@contextmanager
def _record_calls(network: nn.Module) -> Iterator[list[tuple[nn.Module, Any]]]:
    """The (module, output) pairs of a forward pass, in the order in which the modules finish."""
    calls: list[tuple[nn.Module, Any]] = []

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        calls.append((module, output))

    handles = [module.register_forward_hook(record) for module in network.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _zeros_filled(network: nn.Module) -> Iterator[None]:
    """Parameters that start at zero (heads, residual scales) hide who influences whom: fill them for a trial."""
    zeros = [parameter for parameter in network.parameters() if not parameter.any()]
    with torch.no_grad():
        for parameter in zeros:
            parameter.fill_(0.01)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def _allow_double_backward(modules: Iterable[nn.Module]) -> None:
    # Fused attention has no double backward; before the target layer none is needed.
    for module in modules:
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]


def _ensure_graph(features: Tensor) -> None:
    # With a frozen backbone nothing before the features needs a gradient; the head's graph starts here then.
    if torch.is_grad_enabled() and not features.requires_grad:
        features.requires_grad_()


def _read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a file, without running any code that it may hold."""
    if not path.is_file():
        raise InputError(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file provokes in the two readers
        raise InputError(f"{path} is not a readable weights file: {_first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds no state dict but a {type(loaded).__name__}")
    return loaded


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
