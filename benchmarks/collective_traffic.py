"""What the class sums of BCPL send between ranks: counted, timed on gloo, and modelled for GPU clusters.

Bytes and calls are counted by a wrapper around `torch.distributed.all_reduce` while real ranks compute class CAMs and
their gradients, by both reductions, for the feature maps (C, K, H, W) of several models. The same ranks time every
collective, each after a barrier, and between them bare all-reduces of several sizes, which the model of a collective
is fitted to:

    seconds(n bytes, W ranks) = hops(W)·latency + 2·(W - 1)/W · n / bandwidth

hops(W) = 2·(W - 1) for gloo's ring, 2·⌈log₂ W⌉ for the trees that NCCL takes where latency matters. The model, with
the stated latency and bandwidth of a GPU cluster, then gives the CAM's share of a training step of ResNet-50.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from distributed_batchcam import class_cams
from distributed_batchcam.class_sums import Reduction

from .timing import Bar, Table, argument_parser, positive, report

Case = tuple[str, Reduction]
"""Name of a shape, and a reduction."""

REDUCTIONS: tuple[Reduction, ...] = ("factored", "sums")
SAMPLES = 16  # of each rank
BARE_BYTES = (4, 1 << 10, 8 << 10, 64 << 10, 512 << 10, 4 << 20, 32 << 20)
PATIENCE = timedelta(seconds=300)
BYTES_BAR, SHARE_BAR = 1 / 20, 2.0


class Shape(NamedTuple):
    """Classes and the feature maps that explain them."""

    classes: int
    channels: int
    height: int
    width: int


RESNET50 = "ResNet-50, ImageNet-1k, 224"
SHAPES = {
    "simple_cnn, 28": Shape(10, 64, 14, 14),
    "resnet18, 28": Shape(10, 512, 4, 4),
    "convnextv2_tiny, 112": Shape(10, 768, 13, 13),
    RESNET50: Shape(1000, 2048, 7, 7),
}


class Cluster(NamedTuple):
    """A stated interconnect: latency of a hop in seconds, bandwidth of a GPU in bytes a second."""

    gpus: int
    latency: float
    bandwidth: float


# H100 servers: NVLink within one (450 GB/s each way, two thirds of it reached), beyond it one 400 Gb/s port for each
# GPU (50 GB/s). The latencies are round figures for a hop of NCCL, launch included.
CLUSTERS = (Cluster(8, 5e-6, 300e9), Cluster(64, 10e-6, 50e9), Cluster(1024, 10e-6, 50e9))
# What the CAM's collectives are compared with: a round figure for ResNet-50 in mixed precision on one H100.
IMAGES_PER_SECOND, IMAGES_PER_GPU = 3000.0, 256
GRADIENT_BYTES = 25_557_032 * 4
BACKWARD_SHARE = 2 / 3  # of a step, in which DDP's own all-reduce of the gradients hides


@dataclass
class Found:
    """What one rank counts and times of one shape and reduction."""

    sizes: list[int] = field(default_factory=list)  # bytes of each collective, forwards and backwards
    seconds: list[list[float]] = field(default_factory=list)  # of each collective, by round

    @property
    def totals(self) -> list[float]:
        """Seconds in collectives, by round."""
        return [sum(times) for times in self.seconds]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argument_parser(
        "collective_traffic", "Collectives of BCPL: counted, timed on gloo, modelled for GPU clusters.", rounds=10
    )
    parser.add_argument("--processes", type=positive, nargs="+", default=[2, 4], help="2 4")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, metavar="SHAPE", help="all")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        parser.error("--device cuda: gloo runs on the CPU")
    if min(options.processes) < 2:
        parser.error(f"--processes must be at least 2, got {min(options.processes)}")

    tables, traffic, gloo = [], [], []
    for world in options.processes:
        bare, found = measured(world, options.shapes, options.rounds, options.warmup, options.threads)
        for name in options.shapes:
            times: dict[str, list[float]] = {reduction: found[name, reduction].totals for reduction in REDUCTIONS}
            tables.append(Table.of(f"collectives of a step, {name}, gloo, {world} ranks", times))
        gloo.append(compared(world, bare, found))
        print(compared_in_words(gloo[-1]))
    for (name, reduction), of in found.items():
        traffic.append({"name": name, **SHAPES[name]._asdict(), "reduction": reduction, "bytes": of.sizes})
    print()
    for row in traffic:
        sizes = row["bytes"]
        print(f"{row['name']}, {row['reduction']}: {len(sizes)} calls, {sum(sizes):,} bytes ({sizes})")
    by_name = {(row["name"], row["reduction"]): row["bytes"] for row in traffic}
    counted = RESNET50 in options.shapes
    shares = [modelled_share(cluster, by_name[RESNET50, "factored"]) for cluster in CLUSTERS] if counted else []
    bars = [
        Bar(
            f"bytes of factored ÷ bytes of sums, {RESNET50},",
            "at most",
            BYTES_BAR,
            sum(by_name[RESNET50, "factored"]) / sum(by_name[RESNET50, "sums"]) if counted else None,
        ),
        *(
            Bar(
                f"CAM collectives in the modelled step, {RESNET50}, {cluster.gpus:,} GPUs,",
                "at most",
                SHARE_BAR,
                100 * shares[index] if counted else None,
                unit=" %",
            )
            for index, cluster in enumerate(CLUSTERS)
        ),
    ]
    model = {
        "clusters": [cluster._asdict() for cluster in CLUSTERS],
        "images_per_second": IMAGES_PER_SECOND,
        "images_per_gpu": IMAGES_PER_GPU,
        "share_of_step": shares,
    }
    report(
        "collective_traffic",
        options,
        torch.device("cpu"),
        tables,
        bars,
        further={"traffic": traffic, "gloo": gloo, "model": model},
    )


# The model ----------------------------------------------------------------------------------------


def ring_hops(world: int) -> int:
    """Steps of a ring all-reduce, one after another."""
    return 2 * (world - 1)


def tree_hops(world: int) -> int:
    """Steps up and down a binary tree."""
    return 2 * math.ceil(math.log2(world))


def collective_seconds(size: float, hops: int, world: int, latency: float, bandwidth: float) -> float:
    """Of an all-reduce of `size` bytes; each rank sends and receives 2·(W - 1)/W of them."""
    return hops * latency + 2 * (world - 1) / world * size / bandwidth


def fitted(bare: Mapping[int, float], hops: int, world: int) -> tuple[float, float]:
    """Latency (s a hop) and bandwidth (bytes/s) from seconds by bytes: least squares of the relative errors."""
    sizes, seconds = (torch.tensor(list(values), dtype=torch.float64) for values in (bare.keys(), bare.values()))
    terms = torch.stack([torch.full_like(sizes, hops), 2 * (world - 1) / world * sizes], 1)
    latency, inverse = torch.linalg.lstsq(terms / seconds[:, None], torch.ones_like(seconds)).solution.tolist()
    return latency, 1 / inverse


def compared(world: int, bare: Mapping[int, float], found: Mapping[Case, "Found"]) -> dict[str, Any]:
    """The model fitted to bare all-reduces on gloo, and measured ÷ modelled time of these and of class CAMs."""
    hops = ring_hops(world)
    latency, bandwidth = fitted(bare, hops, world)

    def ratio(measured: float, sizes: Sequence[int]) -> float:
        return measured / sum(collective_seconds(size, hops, world, latency, bandwidth) for size in sizes)

    return {
        "ranks": world,
        "latency": latency,
        "bandwidth": bandwidth,
        "bare": [
            {"bytes": size, "seconds": time, "measured ÷ modelled": ratio(time, [size])} for size, time in bare.items()
        ],
        "class_cams": [
            {
                "shape": name,
                "reduction": reduction,
                "measured ÷ modelled": ratio(statistics.median(of.totals), of.sizes),
            }
            for (name, reduction), of in found.items()
        ],
    }


def compared_in_words(entry: dict[str, Any]) -> str:
    """What `compared` found, a line each."""
    rate = f"{1e6 * entry['latency']:.0f} µs a hop, {entry['bandwidth'] / 1e9:.2f} GB/s"
    lines = [f"gloo, {entry['ranks']} ranks: {rate}; measured ÷ modelled:"]
    lines += [f"  bare, {row['bytes']:,} bytes: {row['measured ÷ modelled']:.2f}" for row in entry["bare"]]
    lines += [f"  {row['shape']}, {row['reduction']}: {row['measured ÷ modelled']:.2f}" for row in entry["class_cams"]]
    return "\n".join(lines)


def modelled_share(cluster: Cluster, sizes: Sequence[int]) -> float:
    """The CAM's collectives ÷ the whole step of ResNet-50, in data parallel."""

    def seconds(size: int) -> float:
        return collective_seconds(size, tree_hops(cluster.gpus), cluster.gpus, cluster.latency, cluster.bandwidth)

    computing = IMAGES_PER_GPU / IMAGES_PER_SECOND
    exposed = max(0.0, seconds(GRADIENT_BYTES) - BACKWARD_SHARE * computing)
    cam = sum(map(seconds, sizes))
    return cam / (computing + exposed + cam)


# The ranks ----------------------------------------------------------------------------------------


def measured(
    world: int, shapes: Sequence[str], rounds: int, warmup: int, threads: int
) -> tuple[dict[int, float], dict[Case, Found]]:
    """Of rank 0 of so many: median seconds of bare all-reduces by bytes, and what it found of class CAMs."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(  # type: ignore[attr-defined]
            _rank, args=(world, folder, shapes, rounds, warmup, max(1, threads // world)), nprocs=world
        )
        document = json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))
    bare = {int(size): statistics.median(times) for size, times in document["bare"].items()}
    return bare, {(entry["shape"], entry["reduction"]): Found(**entry["found"]) for entry in document["found"]}


def _rank(rank: int, world: int, folder: str, shapes: Sequence[str], rounds: int, warmup: int, threads: int) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=PATIENCE
    )
    try:
        steps = {(name, reduction): _class_cams(SHAPES[name], reduction) for name in shapes for reduction in REDUCTIONS}
        found = {case: Found() for case in steps}
        bare: dict[int, list[float]] = {size: [] for size in BARE_BYTES}
        for number in range(warmup + rounds):
            for case, step in steps.items():
                with counted() as calls:
                    step()
                if number >= warmup:
                    found[case].sizes = [size for size, _ in calls]
                    found[case].seconds.append([seconds for _, seconds in calls])
                # Between the steps, not on their own: they find the caches and the ranks as the CAM's collectives do.
                for size in BARE_BYTES:
                    numbers = torch.zeros(size // 4)
                    with counted() as calls:
                        dist.all_reduce(numbers)
                    bare[size] += [seconds for _, seconds in calls if number >= warmup]
        if rank == 0:
            entries = [
                {"shape": name, "reduction": reduction, "found": asdict(of)} for (name, reduction), of in found.items()
            ]
            Path(folder, "found.json").write_text(json.dumps({"bare": bare, "found": entries}), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _class_cams(shape: Shape, reduction: Reduction) -> Callable[[], None]:
    """A function that computes class CAMs of random features, and their gradients."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    head = torch.rand(shape.channels, shape.classes, generator=generator)
    features = torch.rand(SAMPLES, *shape[1:], generator=generator, requires_grad=True)
    targets = torch.randint(shape.classes, (SAMPLES,), generator=generator)

    def step() -> None:
        logits = features.mean((2, 3)).square() @ head
        class_cams(
            logits, features, targets, shape.classes, reduction=reduction, create_graph=True, validate=False
        ).maps.sum().backward()
        features.grad = None

    return step


@contextmanager
def counted() -> Iterator[list[tuple[int, float]]]:
    """The all-reduces within, as (bytes, seconds); each begins when all ranks have come to it."""
    calls: list[tuple[int, float]] = []
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        dist.barrier()
        start = time.perf_counter()
        result = original(tensor, *args, **kwargs)
        calls.append((tensor.numel() * tensor.element_size(), time.perf_counter() - start))
        return result

    with patch.object(dist, "all_reduce", all_reduce):
        yield calls


if __name__ == "__main__":
    main()
