"""Processes and devices: Accelerate started as the user meant it, or not at all."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from .config import RunConfig
from .errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

EMULATED_BF16 = "this CPU has no bfloat16 arithmetic and only emulates it: --precision no is many times as fast"
SHARED_STORE = (
    "restarted processes may not meet: launch with --rdzv-backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
)


def start_accelerator(config: RunConfig) -> "Accelerator":
    """The `Accelerator` of this process.

    Launchers can degrade silently to one process, or to several that each believe they are alone; either
    would train on the wrong batch without a word. What the launcher announced must be what Accelerate sees.

    Raises:
        InputError: fewer processes than were launched, or a device that is not there.
    """
    launched = _launched_processes()
    if config.debug and launched > 1:
        raise InputError(f"--debug is for one process, {launched} were launched: start it without a launcher")
    cpu = _use_cpu(config.device)
    if config.precision == "fp16" and cpu:
        raise InputError("--precision fp16 needs a GPU: use bf16 or no")
    if config.sync_batchnorm and cpu:
        raise InputError("--sync-batchnorm needs GPUs: leave it out")
    if cpu:
        # Set by schedulers that saw a GPU, it would go before cpu=True.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if config.debug:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only so

    from accelerate import (
        Accelerator,
        DataLoaderConfiguration,
        DistributedDataParallelKwargs,
        InitProcessGroupKwargs,
    )
    from accelerate.state import AcceleratorState, GradientState

    # Accelerate's state is global: a run in the same process as an earlier one must not inherit its settings.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    timeout = timedelta(seconds=config.timeout)
    _meet(cpu, timeout)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        # split_batches: the batch size is the global one, so the schedule moves once a step, not once a rank.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # Running statistics are averaged before they are used (see `average_buffers`), not sent in every step.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timeout),
        ],
    )
    if accelerator.num_processes != launched:
        raise InputError(
            f"{launched} processes were launched, but this one sees {accelerator.num_processes}: "
            "check the launcher's configuration (accelerate env)"
        )
    return accelerator


def restarts_may_not_meet() -> bool:
    """Whether an elastic launcher on several machines gives its restarts the store of those before them."""
    return _shares_store_with_restarts() and not _on_one_machine()


def _meet(cpu: bool, timeout: timedelta) -> None:
    """Make the process group where Accelerate's would mix up the restarts of an elastic launcher.

    `torchrun --max-restarts` and `accelerate launch --max_restarts` give all restarts one store. Processes would read
    in it where those before them listened (https://github.com/pytorch/pytorch/issues/135712), unless each restart
    keeps its keys apart. What counts the restarts is known to agree between the processes of one machine alone.
    """
    if torch.distributed.is_initialized() or not (_shares_store_with_restarts() and _on_one_machine()):
        return
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    environment = os.environ
    shared = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False, timeout=timeout)
    torch.distributed.init_process_group(
        "gloo" if cpu else "nccl",
        store=PrefixStore(f"restart-{environment['TORCHELASTIC_RESTART_COUNT']}", shared),
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        timeout=timeout,
    )


def _shares_store_with_restarts() -> bool:
    environment = os.environ
    return (
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    )


def _on_one_machine() -> bool:
    return os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]


def emulates_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is emulated, at a tenth of the speed of float32: by x86 CPUs without AVX-512."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "NO AVX")


def describe(accelerator: "Accelerator") -> str:
    """How many processes on which devices and backend, in words."""
    count = accelerator.num_processes
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if count == 1:
        return f"1 process on {name}"
    return f"{count} processes on {name} ({torch.distributed.get_backend()})"


def decided_by_main(accelerator: "Accelerator", decide: Callable[[], T]) -> T:
    """What the main process decides, on every rank; bad input that it meets is raised on every rank too."""
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [decide()]
        except InputError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return cast(T, outcome[0])


def main_first(accelerator: "Accelerator", load: Callable[[], T]) -> T:
    """`load()` on every rank, but on the main process alone at first: what it downloads, the others find there."""
    loaded: list[T] = []
    decided_by_main(accelerator, lambda: loaded.append(load()))
    return loaded[0] if loaded else load()


def float_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that differ between ranks within an epoch: running statistics."""
    return {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}


def average_buffers(module: torch.nn.Module, accelerator: "Accelerator") -> None:
    """Give all ranks the mean of their floating-point buffers (running statistics), in one collective."""
    if accelerator.num_processes == 1:
        return
    buffers = list(float_buffers(module).values())
    if not buffers:
        return
    flat = torch.cat([buffer.flatten().double() for buffer in buffers])
    torch.distributed.all_reduce(flat)
    flat /= accelerator.num_processes
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def _launched_processes() -> int:
    environment = os.environ
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment:
        # `accelerate launch --cpu --num_processes 2` prepares an address for several and starts one.
        raise InputError(
            "accelerate launch was asked for several processes but started one; on CPUs launch with "
            "--config_file cluster/accelerate/cpu_gloo.yaml, or ACCELERATE_USE_CPU=true and --multi_gpu"
        )
    return 1


def choose_device(name: str) -> torch.device:
    """The device of work for one process: `cpu`, `cuda`, or `auto`, the GPU if there is one.

    Raises:
        InputError: no such device, or a launcher that started several processes.
    """
    if _launched_processes() > 1:
        raise InputError("this is work for one process: start it without a launcher")
    return torch.device("cpu" if _use_cpu(name) else "cuda")


def _use_cpu(device: str) -> bool:
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU is visible here (batchcam doctor says more)")
    if device == "auto":
        return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    return device == "cpu"
