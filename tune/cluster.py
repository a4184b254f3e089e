"""The Ray cluster that a sweep runs on: joined, or started on this machine, and whether a trial fits into it."""

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from distributed_batchcam.errors import InputError

WAIT_SECONDS = 45
"""That a cluster gets to have room for one trial."""


@dataclass(frozen=True)
class Resources:
    """What one trial asks for."""

    workers: int
    cpus: float  # per worker
    gpus: float  # per worker

    @property
    def bundle(self) -> dict[str, float]:
        """One worker's share, as Ray has it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU{'' if self.gpus == 1 else 's'}" if self.gpus else ""
        return (
            f"{self.workers} worker{'' if self.workers == 1 else 's'} "
            f"with {self.cpus:g} CPU{'' if self.cpus == 1 else 's'}{gpus}{'' if self.workers == 1 else ' each'}"
        )


@contextmanager
def connected(address: str | None) -> Iterator[bool]:
    """A connection to the cluster at `address`; without one, a Ray of our own on this machine.

    Yields:
        Whether the cluster is one that was there before.

    Raises:
        InputError: Ray is not installed, or no cluster is at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    with _on_loopback() if address is None else nullcontext():
        was_there = _connect(address)
    if was_there:
        yield True
        return
    try:
        yield address is not None
    finally:
        import ray

        ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is imported and started meanwhile listens on the loopback interface alone, as it does on desktops.

    The variable does not stay: a `ray start` of this process would keep its node from joining a cluster.
    """
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before = os.environ.get(name)
    os.environ.setdefault(name, "0")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _connect(address: str | None) -> bool:
    """Whether this process was connected before; if not, it is now."""
    try:
        import ray
    except ImportError:
        raise InputError("sweeps need Ray: pip install 'distributed-batchcam[tune]'") from None
    if ray.is_initialized():
        return True
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            _require_listener(address)
            ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster at {address} ({' '.join(str(error).split())[:200]}): check --address, "
            "or leave it out to use this machine"
        ) from None
    if in_main_thread:
        # Ray ends the process at SIGTERM; whoever called has a word to say first.
        signal.signal(signal.SIGTERM, on_sigterm)
    return False


def _require_listener(address: str) -> None:
    """Ray itself would try for many minutes before it says that nothing listens at HOST:PORT."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def resources_per_trial(workers: int, cpus: float, gpus: float | None, *, is_cluster: bool) -> Resources:
    """What a trial asks for; where nothing is said, a GPU per worker if there are any.

    Raises:
        InputError: a cluster without a GPU, for now or for ever.
    """
    if gpus is None:
        import ray

        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        if is_cluster and not gpus:
            raise InputError(
                "the cluster has no GPU now: say --gpus-per-worker 1 to have its autoscaler bring one, or 0 for CPUs"
            )
    if workers > 1 and gpus % 1:
        raise InputError(
            f"--gpus-per-worker {gpus:g} with --workers-per-trial {workers}: workers of one trial cannot share a GPU"
        )
    return Resources(workers, cpus, gpus)


def require_room(wanted: Resources, wait: float) -> None:
    """Wait until the cluster is large enough for one trial, busy or not.

    Raises:
        InputError: it is not after `wait` seconds.
    """
    import ray

    end = time.monotonic() + wait
    # A request that is pending is what makes an autoscaler add nodes.
    group = None
    try:
        while not _fits(wanted):
            if time.monotonic() >= end:
                raise InputError(
                    f"a trial asks for {wanted}, the cluster has {_what_there_is()}: lower --workers-per-trial, "
                    "--gpus-per-worker or --cpus-per-worker, or add nodes (--wait SECONDS gives them time to come)"
                )
            if group is None:
                print(f"batchcam: waiting up to {wait:g} s for {wanted}", flush=True)
                group = ray.util.placement_group([wanted.bundle] * wanted.workers, strategy="PACK")
            time.sleep(1)
    finally:
        if group is not None:
            ray.util.remove_placement_group(group)


def _fits(wanted: Resources) -> bool:
    """Whether the nodes that are alive could hold a trial, were they idle."""
    workers = 0
    for node in _nodes():
        # 1e-6: four quarters of a GPU are one GPU.
        workers += min(math.floor(node.get(name, 0) / share + 1e-6) for name, share in wanted.bundle.items() if share)
    return workers >= wanted.workers


def _what_there_is() -> str:
    return (
        "; ".join(f"a node of {node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in _nodes())
        or "no node"
    )


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
