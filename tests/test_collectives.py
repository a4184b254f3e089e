"""W ranks are one rank: gradients under real DDP against one process on the whole batch.

Four processes start once and form groups of 2, 3 and 4 ranks in turn. They run every case on every
split, and write down what they found; the tests then compare it with one process.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracles import TinyNet, sample_batch, sample_masks, sample_means
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from distributed_batchcam import BatchCAMLoss, ClassCams, class_cams
from distributed_batchcam.collectives import Upstream, all_reduce_sum, all_reduce_sums, global_mean
from distributed_batchcam.distances import DISTANCES
from distributed_batchcam.objectives import CAMLossOptions, LossParts, Objective

WORLDS = (2, 3, 4)
REDUCTIONS = ("factored", "sums", "local")
PATIENCE = 240.0  # seconds for all processes together; about 20 are needed on an idle machine
TOLERANCE = 1e-12
CAM_WEIGHT = 20.0  # so that the CAMs' share of the gradient is no smaller than the cross-entropy's

# Class 4 is absent everywhere.
TARGETS = torch.tensor([0, 3, 1, 0, 2, 1, 2, 1, 3, 0, 2, 1])
SAMPLES, CLASSES = len(TARGETS), 5
CHANNELS, HEIGHT, WIDTH = TinyNet.channels, 5, 5


@dataclass(frozen=True)
class Case:
    """One objective, as a trainer calls it."""

    objective: str
    knows_batch_size: bool = True
    with_alpha: bool = False
    options: CAMLossOptions = field(default_factory=CAMLossOptions)

    def loss(self, model: nn.Module, share: list[int]) -> LossParts:
        """Loss parts of the samples of `share`; `model` maybe within DDP."""
        images, _, prototypes = sample_batch(SAMPLES)
        options = replace(self.options, class_means=lambda: sample_means(prototypes))
        objective = Objective(self.objective, prototypes, weight=CAM_WEIGHT, options=options)
        images = images[share].requires_grad_(objective.differentiates_images)
        logits, features = model(images)
        alpha = getattr(model, "module", model).alpha(features) if self.with_alpha else None
        return objective(
            logits,
            features,
            TARGETS[share],
            images,
            alpha=alpha,
            batch_size=SAMPLES if self.knows_batch_size else None,
            masks=sample_masks(SAMPLES)[share] if objective.needs_masks else None,
        )


CASES = {
    **{
        f"bcpl_{distance}, {reduction}": Case(f"bcpl_{distance}", options=CAMLossOptions(reduction=reduction))
        for distance in DISTANCES
        for reduction in ("factored", "sums")
    },
    **{
        f"{name}, batch size {'given' if given else 'not given'}": Case(name, knows_batch_size=given)
        for name in ("baseline", "pl_l1", "pl_l2", "pl_ssim", "contrastive", "psl", "psl_margin", "pdl", "rrr", "rrr_g")
        for given in (True, False)
    },
    "pl_l2, target class": Case("pl_l2", options=CAMLossOptions(cam_class="target")),
    "pl_l1, closed-form α": Case("pl_l1", with_alpha=True),
    "bcpl_l1, closed-form α": Case("bcpl_l1", with_alpha=True),
    "bcpl_l2, sums, closed-form α": Case("bcpl_l2", with_alpha=True, options=CAMLossOptions(reduction="sums")),
    "rrr_g, closed-form α": Case("rrr_g", with_alpha=True),
    "psl, support": Case("psl", options=CAMLossOptions(support=0.5)),
    "sum of bcpl_l1 and psl": Case("bcpl_l1+0.1psl"),
    "sum of pl_l1, rrr and rrr_g": Case("pl_l1+0.1rrr+2rrr_g", knows_batch_size=False),
    "bcpl_ssim, exponents": Case("bcpl_ssim", options=CAMLossOptions(ssim_exponents=(2, 0.5, 1))),
}

# What may travel; the docstring of `class_sums` says why it is enough.
C, K, HW = CLASSES, CHANNELS, HEIGHT * WIDTH
FACTORED, SUMS = [C * (1 + K), C * HW], [C * (1 + K + K * HW)]
TRAFFIC = {
    # case: (numbers in each collective forwards, and backwards)
    "class_cams, factored": (FACTORED, []),
    "class_cams, sums": (SUMS, []),
    "class_cams, local": ([], []),
    "bcpl_l1, factored": (FACTORED, [C * K]),
    "bcpl_l1, sums": (SUMS, []),
    "bcpl_l1, local": ([], []),
    "bcpl_ssim, factored": (FACTORED, [C * K]),
    "bcpl_ssim, sums": (SUMS, []),
    "bcpl_l1, closed-form α": (FACTORED, [C * K]),
    "bcpl_l2, sums, closed-form α": (SUMS, []),
    "baseline, batch size given": ([], []),
    "baseline, batch size not given": ([1], []),
    "pl_l1, batch size given": ([], []),
    "pl_ssim, batch size given": ([], []),
    "contrastive, batch size given": ([], []),
    "psl, batch size given": ([], []),
    "pdl, batch size given": ([], []),
    "rrr, batch size given": ([], []),
    "rrr_g, batch size given": ([], []),
    "sum of bcpl_l1 and psl": (FACTORED, [C * K]),
    # One for the cross-entropy, one for the loss on the maps.
    "pl_l1, batch size not given": ([1, 1], []),
    "contrastive, batch size not given": ([1, 1], []),
}
TRAFFIC_SPLITS = ("even", "rank_without_samples")


def of_class(*classes: int) -> list[int]:
    return [i for i, y in enumerate(TARGETS.tolist()) if y in classes]


def deal(samples: list[int], ranks: int) -> list[list[int]]:
    return [samples[rank::ranks] for rank in range(ranks)]


def even(world: int) -> list[list[int]]:
    return deal(list(range(SAMPLES)), world)


def ragged(world: int) -> list[list[int]]:
    few = [list(range(3 * rank, 3 * rank + rank)) for rank in range(1, world)]
    return [[i for i in range(SAMPLES) if i not in chain(*few)], *few]


def class_on_one_rank_only(world: int) -> list[list[int]]:
    shares = deal(of_class(1, 2, 3), world)
    return [*shares[:-1], shares[-1] + of_class(0)]


def rank_with_one_class_only(world: int) -> list[list[int]]:
    return [of_class(1)[:3], *deal([of_class(1)[3], *of_class(0, 2, 3)], world - 1)]


def each_class_on_its_own_rank(world: int) -> list[list[int]]:
    return [of_class(*range(rank, CLASSES, world)) for rank in range(world)]


def rank_without_samples(world: int) -> list[list[int]]:
    return [*deal(list(range(SAMPLES)), world - 1), []]


SPLITS = {
    split.__name__: split
    for split in (
        even,
        ragged,
        class_on_one_rank_only,
        rank_with_one_class_only,
        each_class_on_its_own_rank,
        rank_without_samples,
    )
}


def network() -> TinyNet:
    return TinyNet().double()


def cams(share: list[int], reduction: str) -> ClassCams:
    images = sample_batch(SAMPLES)[0]
    return class_cams(*network()(images[share]), TARGETS[share], CLASSES, reduction=reduction)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


# --- in the ranks ---------------------------------------------------------------------------------

COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "gather", "scatter", "send", "recv", "isend", "irecv", "barrier"),
    *("all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor"),
    *("all_to_all", "all_to_all_single", "all_gather_object", "broadcast_object_list", "gather_object"),
)


@contextmanager
def recorded() -> Iterator[list[tuple[str, int]]]:
    """The collectives within, as (name, numbers sent)."""
    calls: list[tuple[str, int]] = []

    def record(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args[0].numel() if args and isinstance(args[0], Tensor) else 0))
            return original(*args, **kwargs)

        return call

    with patch.multiple(dist, **{name: record(name) for name in COLLECTIVES}):
        yield calls


def collectives_of(name: str, share: list[int]) -> dict[str, list[tuple[str, int]]]:
    """What travels forwards and backwards for a case of `TRAFFIC`, without DDP and its own traffic."""
    kind, _, reduction = name.partition(", ")
    with recorded() as forward:
        if kind == "class_cams":
            cams(share, reduction)
            return {"forward": forward, "backward": []}
        case = CASES.get(name) or Case("bcpl_l1", options=CAMLossOptions(reduction=reduction))
        total = case.loss(network(), share).total
    with recorded() as backward:
        total.backward()
    return {"forward": forward, "backward": backward}


def rank_of(world: int, rank: int) -> dict[str, Any]:
    """Everything one rank of `world` finds."""
    found: dict[str, Any] = {"gradients": {}, "parts": {}, "cams": {}, "collectives": {}}
    # Buckets of a kilobyte: DDP's own collectives are then several, and fall between ours.
    model = DistributedDataParallel(network(), bucket_cap_mb=1e-3)
    for split, shares in SPLITS.items():
        share = shares(world)[rank]
        for name, case in CASES.items():
            model.zero_grad()
            parts = case.loss(model, share)
            parts.total.backward()
            found["gradients"][split, name] = gradients(model.module)
            found["parts"][split, name] = torch.stack(parts).detach()

        for reduction in REDUCTIONS:
            found["cams"][split, reduction] = tuple(cams(share, reduction))
        for name in TRAFFIC if split in TRAFFIC_SPLITS else ():
            found["collectives"][split, name] = collectives_of(name, share)

    if world == min(WORLDS):
        found["compiled"] = compiled_maps(even(world)[rank])
    found["own loop"] = own_loop(model, even(world)[rank])
    found["rules"] = backward_rules(world, rank)
    return found


def compiled_maps(share: list[int]) -> dict[str, Any]:
    """BCPL in compiled pieces, the collectives between them."""
    images, _, prototypes = sample_batch(SAMPLES)
    model = DistributedDataParallel(network())
    objective = Objective("bcpl_l1", prototypes, weight=CAM_WEIGHT)
    # Traced and divided as for the real backend, which takes its time.
    with patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        objective.compile_maps()
    with recorded() as collectives:
        parts = objective(*model(images[share]), TARGETS[share], images[share], batch_size=SAMPLES)
    parts.total.backward()
    return {"gradients": gradients(model.module), "collectives": collectives}


def own_loop(model: nn.Module, share: list[int]) -> dict[str, Tensor]:
    """The README's three lines; plain cross-entropy is right where the shares are equal."""
    images, _, prototypes = sample_batch(SAMPLES)
    model.zero_grad()
    logits, features = model(images[share])
    batch_cam = BatchCAMLoss(prototypes)
    loss = nn.functional.cross_entropy(logits, TARGETS[share]) + CAM_WEIGHT * batch_cam(
        logits, features, TARGETS[share]
    )
    loss.backward()
    return gradients(getattr(model, "module", model))


def backward_rules(world: int, rank: int) -> dict[str, Any]:
    """What each rule sends back for an upstream gradient of 1, 2, … by rank, and what it leaves alone."""
    found: dict[str, Any] = {}
    for upstream in Upstream:
        tensor = torch.tensor([1.0, 2.0], requires_grad=True)
        before = tensor.detach().clone()
        total = all_reduce_sum(tensor, upstream)
        (total * (rank + 1)).sum().backward()
        constant = torch.ones(3) * (rank + 1)
        both = all_reduce_sums((constant, tensor), upstream)
        found[upstream.value] = {
            "total": total.detach(),
            "gradient": tensor.grad,
            "input untouched": torch.equal(tensor.detach(), before),
            "constant": both[0],
            "constant requires grad": both[0].requires_grad,
        }
    return found


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank >= world:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting-{world}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=PATIENCE / 2),
        )
        try:
            torch.save(rank_of(world, rank), Path(folder) / f"{world}-{rank}.pt")
        finally:
            dist.destroy_process_group()


# --- on one process -------------------------------------------------------------------------------


Found = dict[int, list[dict[str, Any]]]  # by world size and rank
Expected = dict[str, tuple[dict[str, Tensor], Tensor]]  # by case: gradients and loss parts


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What every rank found, by world size."""
    if not dist.is_gloo_available():
        pytest.skip("this torch is built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(run_rank, args=(str(folder),), nprocs=max(WORLDS), join=False)
    deadline = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"ranks still run after {PATIENCE:.0f} s: a collective hangs"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
                process.join()
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in WORLDS}


@pytest.fixture(scope="module")
def alone() -> Expected:
    """Gradients and loss parts of each case on one process, with the whole batch."""
    found = {}
    for name, case in CASES.items():
        model = network()
        parts = case.loss(model, list(range(SAMPLES)))
        parts.total.backward()
        found[name] = gradients(model), torch.stack(parts).detach()
    return found


def assert_gradients_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error <= TOLERANCE, f"{name}: relative error {error:.1e}"


by_world = pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"{world} ranks")
by_split = pytest.mark.parametrize("split", SPLITS)
by_case = pytest.mark.parametrize("case", CASES)


@by_world
@by_split
def test_splits_hold_every_sample_once(split: str, world: int) -> None:
    shares = SPLITS[split](world)
    assert len(shares) == world
    assert sorted(chain(*shares)) == list(range(SAMPLES))


@by_case
def test_one_process_has_gradients_to_compare_with(alone: Expected, case: str) -> None:
    found, parts = alone[case]
    assert all(gradient.any() for gradient in found.values())
    if not case.startswith("baseline"):
        plain = alone["baseline, batch size given"][0]
        weight = "backbone.0.weight"
        assert (found[weight] - plain[weight]).norm() > 0.01 * plain[weight].norm()
        assert parts[2] > 0.1


@by_world
@by_split
@by_case
def test_w_ranks_are_one_rank(
    ranks: Found,
    alone: Expected,
    case: str,
    split: str,
    world: int,
) -> None:
    expected, parts = alone[case]
    for rank in ranks[world]:
        assert_gradients_equal(rank["gradients"][split, case], expected)
    of_ranks = torch.stack([rank["parts"][split, case] for rank in ranks[world]])
    assert_close(of_ranks.mean(0), parts, rtol=TOLERANCE, atol=0)
    if case.startswith("bcpl"):
        assert_close(of_ranks[:, 2], parts[2].expand(world), rtol=TOLERANCE, atol=0)


def test_ranks_with_compiled_maps_are_one_rank(ranks: Found, alone: Expected) -> None:
    for rank in ranks[min(WORLDS)]:
        assert_gradients_equal(rank["compiled"]["gradients"], alone["bcpl_l1, factored"][0])
        assert rank["compiled"]["collectives"] == [("all_reduce", numbers) for numbers in FACTORED]


@by_world
@by_split
@pytest.mark.parametrize("distance", DISTANCES)
def test_sums_equal_factored(ranks: Found, distance: str, split: str, world: int) -> None:
    for rank in ranks[world]:
        assert_gradients_equal(
            rank["gradients"][split, f"bcpl_{distance}, sums"],
            rank["gradients"][split, f"bcpl_{distance}, factored"],
        )


@by_world
@by_split
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_class_maps_are_those_of_the_global_batch_or_of_the_rank(
    ranks: Found, reduction: str, split: str, world: int
) -> None:
    for rank, share in zip(ranks[world], SPLITS[split](world), strict=True):
        seen = share if reduction == "local" else list(range(SAMPLES))
        expected = cams(seen, "local")
        maps, counts = rank["cams"][split, reduction]
        assert torch.equal(counts, expected.counts)
        assert_close(maps, expected.maps, rtol=TOLERANCE, atol=TOLERANCE)


@by_world
def test_loop_of_one_s_own_under_ddp_is_one_process(ranks: Found, world: int) -> None:
    expected = own_loop(network(), list(range(SAMPLES)))
    for rank in ranks[world]:
        assert_gradients_equal(rank["own loop"], expected)


# --- how much travels -----------------------------------------------------------------------------


@by_world
@pytest.mark.parametrize("split", TRAFFIC_SPLITS)
@pytest.mark.parametrize("case", TRAFFIC)
def test_collectives_are_as_few_and_as_small_as_promised(ranks: Found, case: str, split: str, world: int) -> None:
    """The same on every rank, one without samples too: a rank that skips a collective hangs the job."""
    forward, backward = TRAFFIC[case]
    for rank in ranks[world]:
        found = rank["collectives"][split, case]
        assert found["forward"] == [("all_reduce", numbers) for numbers in forward]
        assert found["backward"] == [("all_reduce", numbers) for numbers in backward]


# --- the rules alone ------------------------------------------------------------------------------


@by_world
def test_backward_rules(ranks: Found, world: int) -> None:
    one_to_world = world * (world + 1) / 2
    for number, rank in enumerate(ranks[world], start=1):
        for rule, gradient in (("replicated", number * world), ("partial", one_to_world)):
            found = rank["rules"][rule]
            assert found["total"].tolist() == [world, 2 * world]
            assert found["gradient"].tolist() == [gradient, gradient]
            assert found["input untouched"]
            assert found["constant"].tolist() == [one_to_world] * 3
            assert not found["constant requires grad"]


def test_without_a_process_group_sums_are_the_identity() -> None:
    tensor = torch.rand(3, requires_grad=True)
    assert all_reduce_sum(tensor, Upstream.REPLICATED) is tensor
    assert all_reduce_sums((tensor, tensor), Upstream.PARTIAL) == (tensor, tensor)
    assert global_mean(tensor).item() == pytest.approx(tensor.mean().item())
    assert global_mean(tensor, 6).item() == pytest.approx(tensor.sum().item() / 6)
