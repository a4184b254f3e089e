"""`batchcam doctor`: what this machine has, what is missing, and what to do about it."""

import importlib.metadata
import netrc
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    found: str  # empty where missing
    remedy: str = ""

    def line(self) -> str:
        """The check as one line of text."""
        if self.found:
            return f"ok       {self.name}: {self.found}"
        return f"missing  {self.name}: {self.remedy}"


def examine(data_root: Path | None = None) -> Iterator[Check]:
    """All checks, in order."""
    yield Check("python", platform.python_version())
    yield from _packages()
    yield from _devices()
    yield from _backends()
    yield from _data(data_root)
    yield _wandb_login()


def _packages() -> Iterator[Check]:
    for name in ("torch", "torchvision", "timm", "accelerate"):
        yield Check(name, _version(name), f"pip install {name}")
    for name, extra, purpose in (
        ("wandb", "wandb", "for --tracker wandb"),
        ("tensorboard", "tensorboard", "for --tracker tensorboard"),
        ("ray", "tune", "for sweeps"),
    ):
        yield Check(name, _version(name), f"pip install 'distributed-batchcam[{extra}]' ({purpose})")


def _devices() -> Iterator[Check]:
    import torch

    from .runtime import EMULATED_BF16, emulates_bf16

    yield Check("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    if emulates_bf16(torch.device("cpu")):
        yield Check("bf16 on the cpu", "", EMULATED_BF16)
    remedy = (
        f"torch {torch.__version__} sees no GPU; training runs on the CPU"
        if torch.version.cuda
        else "this torch was built for CPUs alone; reinstall it from pytorch.org for a GPU"
    )
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    found = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in names)
    yield Check("gpu", found, remedy)
    if names:
        bf16 = "yes" if torch.cuda.is_bf16_supported() else ""
        yield Check("bf16 on the gpu", bf16, "use --precision fp16 instead")


def _backends() -> Iterator[Check]:
    import torch.distributed as dist

    available = dist.is_available()
    gloo, nccl = available and dist.is_gloo_available(), available and dist.is_nccl_available()
    yield Check("gloo (processes on CPUs)", "available" if gloo else "", "this torch was built without it")
    yield Check("nccl (processes on GPUs)", "available" if nccl else "", "this torch was built without it")


def _data(data_root: Path | None) -> Iterator[Check]:
    root = data_root or Path(os.environ.get("BATCHCAM_DATA") or "data")
    yield Check("data: digits", "comes with scikit-learn")
    folders = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py"}
    for name, folder in folders.items():
        there = (root / folder).is_dir() and any((root / folder).iterdir())
        yield Check(
            f"data: {name}",
            str(root / folder) if there else "",
            f"not in {root}; the first run downloads it, or set --data-root or BATCHCAM_DATA",
        )


def _wandb_login() -> Check:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return Check("wandb login", f"not needed, WANDB_MODE={os.environ['WANDB_MODE']}")
    if os.environ.get("WANDB_API_KEY"):
        return Check("wandb login", "WANDB_API_KEY is set")
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    remedy = "wandb login, or WANDB_MODE=offline (for --tracker wandb)"
    return Check("wandb login", f"for {host}" if known else "", remedy)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
