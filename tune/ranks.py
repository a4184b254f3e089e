"""The processes of a trial: rank 0 is the trial itself, every other rank an actor in the trial's placement group.

Ray places them; each gets the environment that torchrun would give it, and Accelerate does the rest.
"""

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distributed_batchcam.config import RunConfig

from .storage import Storage

GRACE_SECONDS = 15  # that rank 0 has to fail by itself after another rank has


@dataclass(frozen=True)
class Place:
    """Where a process runs."""

    node: str
    address: str
    gpus: tuple[str, ...]

    @classmethod
    def here(cls) -> "Place":
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return cls(context.get_node_id(), ray.util.get_node_ip_address(), tuple(map(str, gpus)))


def train_on_all_ranks(
    config: RunConfig, on_epoch: Callable[[dict[str, Any]], None], storage: Storage, name: str
) -> dict[str, Any]:
    """`train(config, on_epoch)` on one process for each bundle of this trial's placement group.

    Args:
        config: of the run; its `out` is the run directory on this machine.
        on_epoch: called on rank 0, this process.
        storage: where ranks on other machines find the run directory.
        name: of the trial.
    """
    from distributed_batchcam.trainer import train

    group = get_current_placement_group()
    others = [_rank_in_bundle(group, index) for index in range(1, len(group.bundle_specs))] if group else []
    if not others:
        return train(config, on_epoch)
    try:
        places = [Place.here(), *ray.get([rank.place.remote() for rank in others])]
        environments = torchrun_environments(places, _free_port())
        running = {
            rank.train.remote(config, environment, None if place.node == places[0].node else str(storage), name): (
                f"rank {environment['RANK']} on {place.address}"
            )
            for rank, place, environment in zip(others, places[1:], environments[1:], strict=True)
        }
        with _in_environment(environments[0]), _watched(running):
            summary = train(config, on_epoch)
            ray.get(list(running))
        return summary
    finally:
        for rank in others:
            ray.kill(rank)
        _leave_process_group()


def torchrun_environments(places: Sequence[Place], port: int) -> list[dict[str, str]]:
    """What torchrun would set for each process; rank 0 is the first, the ranks of a node follow one another."""
    nodes = list(dict.fromkeys(place.node for place in places))
    order = sorted(range(len(places)), key=lambda index: (nodes.index(places[index].node), index))
    environments: list[dict[str, str]] = [{} for _ in places]
    for node in nodes:
        local = [index for index in order if places[index].node == node]
        # All see all GPUs of the trial on their node and take the one of their local rank, as under torchrun.
        gpus = [gpu for index in local for gpu in places[index].gpus]
        for local_rank, index in enumerate(local):
            environments[index] = {
                "RANK": str(order.index(index)),
                "WORLD_SIZE": str(len(places)),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(len(local)),
                "MASTER_ADDR": places[0].address,
                "MASTER_PORT": str(port),
                **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
            }
    return environments


@ray.remote(max_restarts=0)
class _Rank:
    """A rank other than 0."""

    def place(self) -> Place:
        return Place.here()

    def train(self, config: RunConfig, environment: Mapping[str, str], storage: str | None, name: str) -> None:
        """`storage` where this machine is not that of rank 0, whose run directory is under the same path then."""
        from distributed_batchcam.trainer import train

        assert config.out is not None
        copied = storage is not None and Storage.at(storage).copy(name, config.out)
        try:
            with _in_environment(environment):
                train(config)
        finally:
            if copied:
                shutil.rmtree(config.out, ignore_errors=True)
        _leave_process_group()


def _rank_in_bundle(group: Any, index: int) -> Any:
    """The actor of a rank, with all that its bundle reserves."""
    bundle = dict(group.bundle_specs[index])
    return _Rank.options(  # type: ignore[attr-defined]
        num_cpus=bundle.pop("CPU", 0),
        num_gpus=bundle.pop("GPU", 0),
        resources=bundle,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    ).remote()


@contextmanager
def _watched(running: Mapping[Any, str]) -> Iterator[None]:
    """A rank that fails takes the trial along, as under torchrun: rank 0 might wait for it in a collective for ever."""
    done = threading.Event()

    def watch() -> None:
        pending = list(running)
        while pending and not done.is_set():
            ready, pending = ray.wait(pending, timeout=0.5)
            for ref in ready:
                try:
                    ray.get(ref)
                except Exception as error:  # whatever it failed with, dead or alive
                    if not done.wait(GRACE_SECONDS):
                        print(f"batchcam: {running[ref]} failed: {error}", flush=True)
                        os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _in_environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def _leave_process_group() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
