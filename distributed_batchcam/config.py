"""The one place where an option of a training run is declared: type, default, meaning, and cross-checks.

The command line, the YAML files and their validation all come from `RunConfig`. To add an option, add a field.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, cast

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .errors import InputError, unknown_name

Share = Annotated[float, Field(ge=0, lt=1)]
# As long as W&B takes them.
Group = Annotated[str, Field(min_length=1, max_length=128)]
Tag = Annotated[str, Field(min_length=1, max_length=64)]
_INTERVAL = re.compile(r"([1-9][0-9]{0,8})(?:(s)|(step|epoch)s?)")


def _dataset_names() -> Iterable[str]:
    from .data import DATASETS

    return DATASETS


def _objective_names() -> Iterable[str]:
    from .objectives import OBJECTIVES

    return OBJECTIVES


# Names that live in registries elsewhere, fetched only when a value is checked or help is printed: that
# takes an import of torch, which `batchcam --help` does not wait for.
REGISTRIES: dict[str, Callable[[], Iterable[str]]] = {"dataset": _dataset_names, "objective": _objective_names}


class Interval(NamedTuple):
    """Every so many seconds, steps or epochs."""

    amount: int
    unit: Literal["s", "step", "epoch"]


class RunConfig(BaseModel):
    """Everything that a training run depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    dataset: str = "digits"
    """Data set: digits, mnist, fashion_mnist, cifar10, imagefolder (any folder of class folders), or decoy_digits,
    decoy_mnist, decoy_fashion_mnist (a patch gives the class away in training, and lies in the test)."""
    data_root: Path | None = None
    """Folder of the data sets; otherwise $BATCHCAM_DATA, otherwise data/."""
    image_size: PositiveInt | None = None
    """Side of the images in pixels; default: the data set's own."""
    valid_size: NonNegativeInt | None = None
    """Training images held out for validation; 0 validates on the test set, as the paper does. Default: a tenth,
    at most 5,000."""
    cache_images: Literal["auto", "yes", "no"] = "auto"
    """Keep all images on the training device (yes), stream them from files (no), or decide by their size."""
    workers: NonNegativeInt = 4
    """Processes that decode images, where images are streamed from files."""
    prototypes: Path | None = None
    """Folder with one image or mask per class, named by class; default: the average image of each class."""

    model: str = "simple_cnn"
    """simple_cnn, resnet18 or convnextv2_tiny as in the paper, or any model of timm."""
    target_layer: str | None = None
    """Module whose feature maps are explained; default: the last before pooling."""
    pretrained: bool | Path = False
    """Start from published weights (no value), or from a file."""

    objective: str = "bcpl_l1"
    """Loss on the explanations, or a sum such as bcpl_l1+10psl; baseline has none."""
    weight: NonNegativeFloat = 0.1
    """λ, the weight of the loss on the explanations."""
    class_weight: NonNegativeFloat = 1.0
    """λ_class, the weight of the cross-entropy."""
    label_smoothing: Share = 0.0
    """Label smoothing of the cross-entropy."""
    cam_class: Literal["predicted", "target"] = "predicted"
    """pl_*: explain the predicted class or the target class."""
    reduction: Literal["factored", "sums", "local"] = "factored"
    """bcpl_*: how class sums travel between processes; local keeps each process to itself."""
    resize: Literal["cam", "prototypes"] = "cam"
    """pl_*, bcpl_*: bring the CAM to the prototypes' size, or the prototypes to the CAM's."""
    ssim_exponents: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (1.0, 1.0, 1.0)
    """*_ssim: exponents α β γ of luminance, contrast and structure."""
    support: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """psl, psl_margin: value of a prototype below which nothing in its class's images may count."""
    departure: PositiveFloat = 0.36
    """pdl: by how many standard deviations the training images must depart from the prototypes, over all classes, for a
    place (with its surroundings above half of it) not to be judged by."""
    masks: Path | None = None
    """rrr, rrr_g: folder of masks, one per class or training image, bright where an image must not be judged by;
    default: the patch of a decoy data set."""
    margin: PositiveFloat = 1.0
    """contrastive: distance beyond which the map of a wrong prediction costs nothing."""

    epochs: PositiveInt = 3
    """Passes over the training images."""
    batch_size: PositiveInt = 128
    """Images per optimizer step, over all processes: the global batch."""
    accumulate: PositiveInt = 1
    """Pieces into which each global batch is cut to save memory; class means are then taken per piece."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum."""
    lr: PositiveFloat = 2e-3
    """Highest learning rate."""
    momentum: Share = 0.9
    """sgd: momentum."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay."""
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    """Course of the learning rate."""
    warmup: Share | None = None
    """Share of the steps over which the learning rate rises; default: 0.1 for onecycle, otherwise 0."""
    clip_norm: PositiveFloat | None = None
    """Clip the gradient to this norm; default: no clipping."""
    ema: Share = 0.0
    """Decay of an exponential moving average of the weights, which is then what is evaluated and saved; 0: none."""

    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision of the backbone; the head and the CAMs stay in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    compile: bool = False
    """Compile the backbone and the arithmetic of the maps (the head, differentiated twice, stays as it is)."""
    cuda_graph: bool = False
    """Record forward, loss and backward once as a CUDA graph and replay it, for small models on one GPU."""
    channels_last: bool = False
    """Keep images and weights in channels-last order, faster for convolutions on GPUs."""
    sync_batchnorm: bool = False
    """Share batch statistics between processes (GPUs only)."""
    seed: NonNegativeInt = 0
    """Seed of weights and sample order."""

    out: Path | None = None
    """Run directory; default: a new one under runs/."""
    resume: Literal["no", "auto"] = "no"
    """auto continues from the newest intact checkpoint of --out, if there is one."""
    checkpoint_every: str = "1epoch"
    """Save a checkpoint this often: 500s, 200steps or 1epoch. The best epoch, the last, and the step at which a
    signal stops the run are saved besides."""
    max_bad_steps: NonNegativeInt = 10
    """Steps in a row that may be skipped, their gradient not being finite, before the run stops; under fp16, where
    that is how the right scale is found, they are counted only."""
    timeout: PositiveInt = 600
    """Seconds after which a process that gives no sign of life, or keeps the others waiting, ends the run."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep; the best stays besides."""
    log_every: PositiveInt = 50
    """Optimizer steps between two lines of metrics."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Send metrics there too; metrics.jsonl is always written."""
    group: Group | None = None
    """wandb: group that the run belongs to, such as a sweep."""
    tags: tuple[Tag, ...] = ()
    """wandb: tags of the run, separated by spaces."""
    debug: bool = False
    """One process, a few hundred samples, deterministic, anomaly detection, and a verdict at the end."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name] if info.field_name else None
        if isinstance(value, bool) and field is not None and field.annotation not in (bool, bool | Path):
            raise ValueError("needs a value, not yes or no")
        return value

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, value: str) -> str:
        names = _dataset_names()
        if value not in names:
            raise unknown_name("dataset", value, names)
        return value

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, value: str) -> str:
        from .objectives import parse_objective

        parse_objective(value)
        return value

    @field_validator("checkpoint_every")
    @classmethod
    def _is_interval(cls, value: str) -> str:
        if not _INTERVAL.fullmatch(value):
            raise ValueError("needs a number and a unit: 500s, 200steps or 1epoch")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.accumulate:
            raise InputError(
                f"--batch-size {self.batch_size} cannot be cut into --accumulate {self.accumulate} equal pieces"
            )
        if self.weight == 0 and self.objective != "baseline":
            raise InputError(f"--weight 0 makes {self.objective} a baseline: say --objective baseline, or raise it")
        if self.class_weight == 0 and (self.weight == 0 or self.objective == "baseline"):
            raise InputError("--class-weight 0 leaves nothing to train on")
        if self.tracker != "wandb" and (self.group is not None or self.tags):
            raise InputError(f"--{'tags' if self.tags else 'group'} is for --tracker wandb: add that, or leave it out")
        if self.resume == "auto" and self.out is None:
            raise InputError("--resume auto needs --out RUN_DIR: the run to continue")
        return self

    @property
    def warmup_share(self) -> float:
        """`warmup` with its default filled in."""
        return (0.1 if self.schedule == "onecycle" else 0.0) if self.warmup is None else self.warmup

    @property
    def checkpoint_interval(self) -> Interval:
        """`checkpoint_every` taken apart."""
        found = _INTERVAL.fullmatch(self.checkpoint_every)
        assert found is not None
        return Interval(int(found[1]), cast(Any, found[2] or found[3]))

    def to_yaml(self) -> str:
        """All options but where the run lives: `batchcam train --config` on it repeats the run."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude={"out", "resume"}), sort_keys=False)


def make_config(options: dict[str, Any], file: Path | None = None) -> RunConfig:
    """A validated configuration from a YAML file, if any, and options that go before it.

    Raises:
        InputError: one line that names the option, what is wrong and what would be right.
    """
    values = {**(_read_yaml(file) if file else {}), **options}
    try:
        return RunConfig(**values)
    except ValidationError as error:
        raise _one_line(error, file) from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read configuration {file}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{file} is not plain YAML{line}: {problem}") from None
    except (RecursionError, ValueError) as error:  # brackets without end, a date that no calendar has
        reason = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise InputError(f"{file} is not plain YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{file} must hold 'option: value' lines, not a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def _one_line(error: ValidationError, file: Path | None) -> InputError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        where = f" in {file}" if file else ""
        return unknown_name(f"option{where}", name, RunConfig.model_fields, "see batchcam train --help")
    reason = str(cause) if cause else first["msg"][0].lower() + first["msg"][1:]
    return InputError(f"--{name.replace('_', '-')} {first['input']!r}: {reason}")
