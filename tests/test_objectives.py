"""The losses and the objectives: values against loops, gradients against finite differences."""

import re
from collections.abc import Callable
from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import TinyNet, sample_batch, sample_masks
from torch import Tensor
from torch.testing import assert_close

from distributed_batchcam import (
    BatchCAMLoss,
    ContrastiveCAMLoss,
    MaskedGradCAMLoss,
    PrototypeDepartureLoss,
    PrototypeLoss,
    PrototypeSupportLoss,
    RightReasonsLoss,
)
from distributed_batchcam.errors import InputError
from distributed_batchcam.objectives import OBJECTIVES, CAMLossOptions, LossParts, Objective, parse_objective

EXACT = {"rtol": 1e-12, "atol": 1e-12}
DISTANCE_NAMES = ["l1", "l2", "ssim"]
REDUCTIONS = ["factored", "sums", "local"]
ODD_EXPONENTS = (1.5, 0.5, 2.0)


def test_the_names_of_the_objectives_are_a_contract() -> None:
    assert set(OBJECTIVES) == {
        *("baseline", "pl_l1", "pl_l2", "pl_ssim", "bcpl_l1", "bcpl_l2", "bcpl_ssim", "contrastive"),
        *("psl", "psl_margin", "pdl", "rrr", "rrr_g"),
    }


def options_for(prototypes: Tensor, **options: object) -> CAMLossOptions:
    """Options with the mean images that the oracles take."""
    return CAMLossOptions(class_means=lambda: oracles.sample_means(prototypes), **options)


def parts_of(objective: Objective, model: TinyNet, images: Tensor, targets: Tensor) -> LossParts:
    """As a trainer calls it: images that require a gradient, and masks, where the objective asks for them."""
    images = images.detach().requires_grad_(objective.differentiates_images)
    masks = sample_masks(len(images)).to(images.device) if objective.needs_masks else None
    return objective(*model(images), targets, images, masks=masks)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["pool", "flat"])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_is_that_of_loops(name: str, in_chans: int, head: str, device: torch.device) -> None:
    model = TinyNet(in_chans=in_chans, head=head).double()
    images, targets, prototypes = sample_batch(in_chans=in_chans)
    cam = oracles.cam_part(name, model, images, targets, prototypes, masks=sample_masks())
    classification = oracles.cross_entropy(model(images)[0], targets)
    assert (cam > 0.01) == (name != "baseline")

    objective = Objective(name, prototypes, weight=0.7, class_weight=0.9, options=options_for(prototypes)).to(device)
    parts = parts_of(objective, model.to(device), images.to(device), targets.to(device))
    for found, expected in zip(parts, (0.9 * classification + 0.7 * cam, classification, cam), strict=True):
        assert_close(found.item(), expected, **EXACT)


@pytest.mark.parametrize("direction", ["cam", "prototypes"])
@pytest.mark.parametrize("cam_class", ["predicted", "target"])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if "pl_" in name])
def test_options_of_prototype_objectives(name: str, cam_class: str, direction: str) -> None:
    model, (images, targets, prototypes) = TinyNet().double(), sample_batch()
    expected = oracles.cam_part(
        name,
        model,
        images,
        targets,
        prototypes,
        cam_class=cam_class,
        direction=direction,
        exponents=ODD_EXPONENTS,
    )
    options = CAMLossOptions(cam_class=cam_class, resize=direction, ssim_exponents=ODD_EXPONENTS)
    parts = Objective(name, prototypes, options=options)(*model(images), targets, images)
    assert_close(parts.cam.item(), expected, **EXACT)


@pytest.mark.parametrize("margin", [0.5, 2.0, 10.0])
def test_margin_of_the_contrastive_objective(margin: float) -> None:
    model, (images, targets, prototypes) = TinyNet().double(), sample_batch()
    right = model(images)[0].argmax(1) == targets
    assert right.any(), "no right prediction to pull"
    assert not right.all(), "no wrong prediction to push"
    expected = oracles.cam_part("contrastive", model, images, targets, prototypes, margin=margin)
    parts = Objective("contrastive", prototypes, options=CAMLossOptions(margin=margin))(*model(images), targets, images)
    assert_close(parts.cam.item(), expected, **EXACT)


def test_options_change_what_they_say_they_change() -> None:
    """Otherwise the comparisons above could pass with options that nobody reads."""
    model, (images, targets, prototypes) = TinyNet().double(), sample_batch()

    def value(name: str, **options: object) -> float:
        objective = Objective(name, prototypes, options=options_for(prototypes, **options))
        return parts_of(objective, model, images, targets).cam.item()

    assert value("pl_l1", cam_class="target") != pytest.approx(value("pl_l1"))
    assert value("bcpl_l1", resize="prototypes") != pytest.approx(value("bcpl_l1"))
    assert value("bcpl_ssim", ssim_exponents=ODD_EXPONENTS) != pytest.approx(value("bcpl_ssim"))
    assert value("contrastive", margin=9.0) != pytest.approx(value("contrastive"))
    assert value("psl", support=0.5) > value("psl")
    assert value("pdl", departure=0.02) > value("pdl")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("distance", DISTANCE_NAMES)
def test_every_reduction_is_the_same_on_one_process(distance: str, reduction: str) -> None:
    model, (images, targets, prototypes) = TinyNet().double(), sample_batch()

    def run(reduction: str) -> list[Tensor]:
        loss = BatchCAMLoss(prototypes, distance, reduction)(*model(images), targets)
        return [loss, *torch.autograd.grad(loss, [*model.backbone.parameters(), model.fc1.weight])]

    for found, expected in zip(run(reduction), run("local"), strict=True):
        assert expected.any()
        assert_close(found, expected, **EXACT)


def test_class_loss_is_summed_and_image_loss_averaged() -> None:
    """Twice the same batch: the sum over present classes and the mean over images both stay."""
    model, (images, targets, prototypes) = TinyNet().double(), sample_batch()
    twice_images, twice_targets = images.repeat(2, 1, 1, 1), targets.repeat(2)
    for loss in (BatchCAMLoss(prototypes), PrototypeLoss(prototypes)):
        once = loss(*model(images), targets)
        assert_close(loss(*model(twice_images), twice_targets), once, **EXACT)
    # Prototypes of nothing but ones at a batch without a CAM: each present class costs 1.
    features = torch.rand(4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    logits = -features.mean((2, 3))
    ones = torch.ones(3, 4, 4, dtype=torch.float64)
    targets = torch.tensor([0, 2, 2, 2])
    assert BatchCAMLoss(ones)(logits, features, targets).item() == 2
    assert PrototypeLoss(ones)(logits, features, targets).item() == 1


def test_three_lines_in_a_loop_of_one_s_own_are_the_objective() -> None:
    model, (images, targets, prototypes) = TinyNet().double(), sample_batch()
    logits, features = model(images)
    batch_cam = BatchCAMLoss(prototypes)
    loss = F.cross_entropy(logits, targets) + 0.1 * batch_cam(logits, features, targets)
    assert_close(Objective("bcpl_l1", prototypes)(logits, features, targets, images).total, loss, **EXACT)


def test_label_smoothing_is_that_of_the_cross_entropy() -> None:
    model, (images, targets, prototypes) = TinyNet().double(), sample_batch()
    logits, features = model(images)
    parts = Objective("baseline", prototypes, label_smoothing=0.1)(logits, features, targets, images)
    assert_close(parts.total, F.cross_entropy(logits, targets, label_smoothing=0.1), **EXACT)


# --- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("baseline", ()),
        ("psl", ((1, "psl"),)),
        ("0.5psl", ((0.5, "psl"),)),
        ("bcpl_l1+10psl", ((1, "bcpl_l1"), (10, "psl"))),
        ("2rrr_g+0.25pl_ssim+rrr", ((2, "rrr_g"), (0.25, "pl_ssim"), (1, "rrr"))),
    ],
)
def test_sums_are_read_as_they_are_written(text: str, terms: tuple[tuple[float, str], ...]) -> None:
    assert parse_objective(text) == terms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bcpl_l1+pls", r"unknown objective 'pls'; did you mean .*psl.*\? \(known: baseline, pl_l1.*sums such as"),
        ("bcpl_l1 + psl", r"unknown objective 'bcpl_l1 '; did you mean bcpl_l1"),
        ("bcpl_l1+", "unknown objective ''"),
        ("", "unknown objective ''"),
        ("-1psl", "unknown objective '-1psl'; did you mean psl"),
        ("1e3psl", "unknown objective 'e3psl'; did you mean psl"),
        ("psl\n", r"unknown objective 'psl\\n'; did you mean psl"),
        ("baseline+psl", r"objective 'baseline\+psl': baseline adds nothing, leave it out of the sum"),
        ("2baseline", "objective '2baseline': baseline adds nothing"),
        ("psl+2psl", r"objective 'psl\+2psl' must name each loss once, with a finite factor above 0"),
        ("bcpl_l1+0psl", ".* must name each loss once, with a finite factor above 0"),
        pytest.param(f"{'9' * 400}psl", ".* must name each loss once, with a finite factor", id="infinite factor"),
    ],
)
def test_sums_that_cannot_be_read_are_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        parse_objective(text)


def test_a_sum_is_the_sum_of_its_terms_times_their_factors() -> None:
    model, (images, targets, prototypes) = TinyNet().double(), sample_batch()
    terms = {"bcpl_l1": 1, "psl": 10, "rrr": 0.5, "rrr_g": 2, "pdl": 3}
    expected = sum(
        factor * oracles.cam_part(name, model, images, targets, prototypes, masks=sample_masks())
        for name, factor in terms.items()
    )
    options = options_for(prototypes)
    objective = Objective("bcpl_l1+10psl+0.5rrr+2rrr_g+3pdl", prototypes, weight=0.7, options=options)
    parts = parts_of(objective, model, images, targets)
    assert_close(parts.cam.item(), expected, **EXACT)
    assert_close(parts.total, parts.classification + 0.7 * parts.cam, **EXACT)


@pytest.mark.parametrize(
    ("name", "needs_masks", "differentiates_images"),
    [
        ("baseline", False, False),
        ("bcpl_l1+psl", False, False),
        ("rrr_g", True, False),
        ("psl+rrr_g", True, False),
        ("psl+rrr", True, True),
        ("psl+pdl", False, True),
    ],
)
def test_a_sum_needs_what_one_of_its_terms_needs(name: str, needs_masks: bool, differentiates_images: bool) -> None:
    prototypes = sample_batch()[2]
    objective = Objective(name, prototypes, options=options_for(prototypes))
    assert objective.needs_masks == needs_masks
    assert objective.differentiates_images == differentiates_images


@pytest.mark.parametrize("support", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("head", ["pool", "flat"])
def test_support_decides_what_is_outside(head: str, support: float) -> None:
    model, (images, targets, prototypes) = TinyNet(head=head).double(), sample_batch()
    expected = oracles.prototype_support(model, images, targets, prototypes, support)
    assert_close(PrototypeSupportLoss(prototypes, support)(*model(images), targets).item(), expected, **EXACT)


@pytest.mark.parametrize("threshold", [0.01, 0.05, 0.36])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_departure_decides_where_the_unexpected_must_not_matter(in_chans: int, threshold: float) -> None:
    model, (images, targets, prototypes) = TinyNet(in_chans=in_chans).double(), sample_batch(in_chans=in_chans)
    means = oracles.sample_means(prototypes)
    expected = oracles.prototype_departure(model, images, targets, prototypes, means, threshold)
    loss = PrototypeDepartureLoss(prototypes, means, threshold)
    images.requires_grad_()
    assert_close(loss(*model(images), targets, images).item(), expected, **EXACT)


def test_departure_is_where_the_data_differ_however_prototypes_are_scaled() -> None:
    """A cue in a row of images that the prototypes know but for it, in another contrast."""
    known = torch.rand(5, 10, 10, dtype=torch.float64)
    means = 0.3 + 0.4 * known
    means[:, 9] += torch.linspace(0.1, 0.5, 5).view(5, 1)
    loss = PrototypeDepartureLoss(known, means)
    assert loss.departs[9].all()
    assert not loss.departs[:9].any()
    assert re.fullmatch(
        r"the training .* prototypes in 10 of 100 pixels, by (0\.\d\d) standard deviations at most", loss.note
    )


def test_a_departure_takes_its_surroundings_along_and_not_what_is_elsewhere() -> None:
    """A strong place with a weaker one beside it, the same weak one apart, and pixels that hardly depart."""
    known = torch.full((4, 8, 8), 0.5, dtype=torch.float64)
    known[:, ::2] = 0.4
    means = known.clone()
    means[:, 1, 1] += 0.3
    means[:, 1, 2] += 0.12
    means[:, 6, 6] += 0.12
    means[:, 1, 3] += 0.02
    departs = PrototypeDepartureLoss(known, means, 0.4).departs
    assert departs.nonzero().tolist() == [[1, 1], [1, 2]]


def test_what_the_prototype_accounts_for_and_what_does_not_depart_cost_nothing() -> None:
    model, (images, targets, _) = TinyNet(head="flat").double(), sample_batch()
    prototypes = torch.rand(5, 10, 10, dtype=torch.float64)
    means = prototypes.clone()
    means[:, :, :3] += 0.2
    loss = PrototypeDepartureLoss(prototypes, means)
    assert not loss.departs[:, 3:].any()
    as_expected = images.clone()
    as_expected[:, 0, :, :3] = loss.expected[targets][:, :, :3]
    for given, costs in ((images, True), (as_expected, False)):
        given = given.detach().requires_grad_()
        assert (loss(*model(given), targets, given).item() > 1e-6) == costs


def test_nothing_inside_the_support_or_outside_the_masks_costs() -> None:
    """Features that are dark outside; maps and input gradients of pixels that no mask holds."""
    model, (images, targets, _) = TinyNet(head="flat").double(), sample_batch()
    images.requires_grad_()
    logits, features = model(images)
    nothing = torch.zeros(7, 10, 10, dtype=torch.bool)
    for loss in (RightReasonsLoss(), MaskedGradCAMLoss()):
        assert loss(logits, features, targets, images, masks=nothing).item() == 0
        assert loss(logits, features, targets, images, masks=~nothing).item() > 0
    left = torch.zeros(5, 5, 10, dtype=torch.float64)
    left[:, :, 4:] = 1
    dark = torch.cat([torch.zeros(7, 6, 5, 2).double(), torch.rand(7, 6, 5, 3).double()], 3).requires_grad_()
    assert PrototypeSupportLoss(left[:, :, ::2])(model.head(dark), dark, targets).item() == 0
    assert PrototypeSupportLoss(1 - left[:, :, ::2])(model.head(dark), dark, targets).item() > 0


# --- absent classes and other edges ---------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("distance", DISTANCE_NAMES)
def test_absent_class_adds_nothing(distance: str, reduction: str) -> None:
    """Classes 3 and 4 have no sample: whatever their prototypes, and with or without them."""
    model, (images, _, prototypes) = TinyNet().double(), sample_batch()
    targets = torch.tensor([0, 1, 2, 2, 1, 0, 0])
    other = prototypes.clone()
    other[3:] = torch.rand_like(other[3:])
    weights = [*model.backbone.parameters(), model.fc1.weight, model.fc2.weight]

    def run(prototypes: Tensor) -> list[Tensor]:
        logits, features = model(images)
        loss = BatchCAMLoss(prototypes, distance, reduction)(logits[:, : len(prototypes)], features, targets)
        return [loss, *torch.autograd.grad(loss, weights)]

    found, with_others, without = run(prototypes), run(other), run(prototypes[:3])
    assert found[0] > 0
    for a, b, c in zip(found, with_others, without, strict=True):
        assert torch.equal(a, b)
        assert_close(a, c, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_of_one(name: str) -> None:
    model, (images, targets, prototypes) = TinyNet().double(), sample_batch()
    expected = oracles.cam_part(name, model, images[:1], targets[:1], prototypes, masks=sample_masks(1))
    parts = parts_of(Objective(name, prototypes, options=options_for(prototypes)), model, images[:1], targets[:1])
    assert_close(parts.cam.item(), expected, **EXACT)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_of_one_class_only(name: str) -> None:
    model, (images, _, prototypes) = TinyNet().double(), sample_batch()
    targets = torch.full((7,), 3)
    expected = oracles.cam_part(name, model, images, targets, prototypes, masks=sample_masks())
    parts = parts_of(Objective(name, prototypes, options=options_for(prototypes)), model, images, targets)
    assert_close(parts.cam.item(), expected, **EXACT)


@pytest.mark.parametrize("resize", ["cam", "prototypes"])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("pdl", "rrr")])
@pytest.mark.parametrize("kind", ["dead", "constant", "one by one"])
def test_constant_maps_leave_values_and_gradients_finite(name: str, kind: str, resize: str) -> None:
    size = 1 if kind == "one by one" else 4
    features = torch.full((3, 2, size, size), 0.5, dtype=torch.float64, requires_grad=True)
    weight = torch.full((5, 2), -1.0 if kind == "dead" else 1.0, dtype=torch.float64, requires_grad=True)
    hidden = torch.tanh(features.mean((2, 3)))
    images, _, prototypes = sample_batch(samples=3)
    if not name.startswith("psl"):
        prototypes[0] = 0
    parts = Objective(name, prototypes, options=CAMLossOptions(resize=resize))(
        hidden @ weight.T, features, torch.tensor([0, 1, 2]), images, masks=sample_masks(3)
    )
    parts.total.backward()
    assert parts.total.isfinite()
    assert features.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_contrastive_is_flat_where_map_and_image_coincide() -> None:
    """Right predictions pull to D = 0 and stay; wrong ones at D = 0 cost the margin, without NaN."""
    for target, value in ((0, 0.0), (1, 4.0)):
        features = torch.rand(1, 1, 4, 4, dtype=torch.float64)
        features = ((features - features.min()) / (features.max() - features.min())).requires_grad_()
        logits = torch.cat([features.mean((2, 3)), -features.mean((2, 3))], 1)
        loss = ContrastiveCAMLoss(2.0)(logits, features, torch.tensor([target]), features.detach())
        loss.backward()
        assert_close(loss.item(), value, **EXACT)
        assert features.grad.isfinite().all()


def test_contrastive_leaves_wrong_predictions_beyond_the_margin_alone() -> None:
    model, (images, _, _) = TinyNet().double(), sample_batch()
    logits, features = model(images)
    wrong = (logits.argmax(1) + 1) % 5
    loss = ContrastiveCAMLoss(0.01)(logits, features, wrong, images)
    assert loss.item() == 0
    loss.backward()
    assert not any(weight.grad.any() for weight in model.backbone.parameters())


# --- gradients ------------------------------------------------------------------------------------

HeadInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def head_inputs(kind: str) -> HeadInputs:
    """Features (4, 2, 4, 4) and the parameters of a head of two layers, 4 classes."""
    width = 2 if kind == "pool" else 8
    shapes = [(4, 2, 4, 4), (5, width), (5,), (4, 5), (4,)]
    features, *parameters = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return (features.requires_grad_(), *(parameter.requires_grad_() for parameter in parameters))


def head(kind: str, features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    if kind == "pool":
        return F.linear(torch.tanh(F.linear(features.mean((2, 3)), w1, b1)), w2, b2)
    return F.linear(F.linear(F.max_pool2d(features, 2).flatten(1), w1, b1).relu(), w2, b2)


def gradient_is_right(kind: str, loss: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """By finite differences of loss(logits, features), in the features and in the head's parameters."""
    inputs = head_inputs(kind)
    grads = torch.autograd.grad(loss(head(kind, *inputs), inputs[0]), inputs, allow_unused=True)
    assert grads[0].any(), "nothing to compare"
    assert grads[1].any(), "nothing to compare"
    return torch.autograd.gradcheck(lambda *inputs: loss(head(kind, *inputs), inputs[0]), inputs)


TARGETS = torch.tensor([0, 1, 1, 3])
EXPONENTS = [(1.0, 1.0, 1.0), ODD_EXPONENTS]
MEASURES = [("l1", EXPONENTS[0]), ("l2", EXPONENTS[0]), *(("ssim", exponents) for exponents in EXPONENTS)]


@pytest.mark.parametrize("kind", ["pool", "flat"])
@pytest.mark.parametrize("cam_class", ["predicted", "target"])
@pytest.mark.parametrize(("distance", "exponents"), MEASURES, ids=str)
def test_gradient_of_the_prototype_loss(
    distance: str, exponents: tuple[float, float, float], cam_class: str, kind: str
) -> None:
    prototypes = 0.1 + 0.8 * torch.rand(4, 5, 5, dtype=torch.float64)
    loss = PrototypeLoss(prototypes, distance, cam_class, ssim_exponents=exponents)
    assert gradient_is_right(kind, lambda logits, features: loss(logits, features, TARGETS))


@pytest.mark.parametrize("kind", ["pool", "flat"])
@pytest.mark.parametrize("reduction", ["factored", "sums"])
@pytest.mark.parametrize(("distance", "exponents"), MEASURES, ids=str)
def test_gradient_of_the_batch_cam_loss(
    distance: str, exponents: tuple[float, float, float], reduction: str, kind: str
) -> None:
    prototypes = 0.1 + 0.8 * torch.rand(4, 5, 5, dtype=torch.float64)
    loss = BatchCAMLoss(prototypes, distance, reduction, ssim_exponents=exponents)
    assert gradient_is_right(kind, lambda logits, features: loss(logits, features, TARGETS))


@pytest.mark.parametrize("kind", ["pool", "flat"])
@pytest.mark.parametrize("margin", [1.0, 3.0])
def test_gradient_of_the_contrastive_loss(kind: str, margin: float) -> None:
    images = torch.rand(4, 3, 6, 6, dtype=torch.float64)
    loss = ContrastiveCAMLoss(margin)
    assert gradient_is_right(kind, lambda logits, features: loss(logits, features, TARGETS, images))


@pytest.mark.parametrize("kind", ["pool", "flat"])
def test_gradient_of_the_prototype_support_loss(kind: str) -> None:
    loss = PrototypeSupportLoss(torch.rand(4, 5, 5, dtype=torch.float64), support=0.5)
    assert gradient_is_right(kind, lambda logits, features: loss(logits, features, TARGETS))


@pytest.mark.parametrize("kind", ["pool", "flat"])
def test_gradient_of_the_masked_grad_cam_loss(kind: str) -> None:
    images, masks = torch.rand(4, 3, 10, 10), sample_masks(4)
    loss = MaskedGradCAMLoss()
    assert gradient_is_right(kind, lambda logits, features: loss(logits, features, TARGETS, images, masks=masks))


@pytest.mark.parametrize("kind", ["pool", "flat"])
def test_gradient_of_the_right_reasons_loss(kind: str) -> None:
    """Of a network that begins with the head: its images are what the head is given."""
    loss, masks = RightReasonsLoss(), sample_masks(4)[:, :4, :4]
    assert gradient_is_right(kind, lambda logits, images: loss(logits, images, TARGETS, images, masks=masks))


@pytest.mark.parametrize("name", ["rrr", "pdl"])
def test_gradient_of_losses_on_input_gradients_goes_through_the_backbone(name: str) -> None:
    model, (images, targets, prototypes) = TinyNet(head="pool").double(), sample_batch(3)
    objective = Objective(name, prototypes, class_weight=0, weight=1, options=options_for(prototypes))
    names = ["backbone.0.weight", "backbone.2.bias", "fc1.weight"]
    weights = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def loss(*weights: Tensor) -> Tensor:
        called = partial(torch.func.functional_call, model, dict(zip(names, weights, strict=True)))
        return parts_of(objective, called, images, targets).total

    assert all(gradient.any() for gradient in torch.autograd.grad(loss(*weights), weights, allow_unused=False)[::2])
    assert torch.autograd.gradcheck(loss, weights)


@pytest.mark.parametrize("kind", ["pool", "flat"])
@pytest.mark.parametrize("name", ["pl_l1", "bcpl_l1", "contrastive", "rrr_g", "bcpl_l1+0.5psl+2rrr_g"])
def test_closed_form_alpha_gives_the_same_loss_and_gradients(name: str, kind: str) -> None:
    model, (images, targets, prototypes) = TinyNet(head=kind).double(), sample_batch()
    objective = Objective(name, prototypes)

    def run(with_alpha: bool) -> list[Tensor]:
        features = model.backbone(images)
        alpha = model.alpha(features) if with_alpha else None
        parts = objective(model.head(features), features, targets, images, alpha=alpha, masks=sample_masks())
        return [parts.total, *torch.autograd.grad(parts.total, list(model.parameters()))]

    for closed_form, general in zip(run(True), run(False), strict=True):
        assert_close(closed_form, general, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [("bcpl_l1", "inductor"), ("pl_l1", "aot_eager"), ("bcpl_ssim", "aot_eager"), ("contrastive", "aot_eager")],
)
def test_compiled_maps_give_the_same_loss_and_gradients(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model, (images, targets, prototypes) = TinyNet(head="pool").double(), sample_batch()

    def run(compiled: bool) -> list[Tensor]:
        objective = Objective(name, prototypes)
        if compiled:
            objective.compile_maps()
        logits, features = model(images)
        total = objective(logits, features, targets, images, alpha=model.alpha(features)).total
        return [total, *torch.autograd.grad(total, list(model.parameters()))]

    for compiled, eager in zip(run(True), run(False), strict=True):
        assert_close(compiled, eager, **EXACT)


def test_loss_without_gradients_carries_no_graph() -> None:
    """Validation: logits under gradients, for the maps; the loss under no_grad."""
    model, (images, targets, prototypes) = TinyNet().double(), sample_batch()
    logits, features = model(images.requires_grad_())
    for name in OBJECTIVES:
        objective = Objective(name, prototypes, options=options_for(prototypes))
        objective = partial(objective, logits, features, targets, images, masks=sample_masks())
        with torch.no_grad():
            parts = objective()
        assert not parts.total.requires_grad
        assert_close(parts, tuple(part.detach() for part in objective()))


# --- precision, devices, state --------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_under_autocast_parts_are_float32_and_train(name: str, device: torch.device) -> None:
    model, (images, targets, prototypes) = TinyNet().to(device), sample_batch()
    images, targets = images.float().to(device), targets.to(device)
    objective = Objective(name, prototypes.float(), options=options_for(prototypes.cpu())).to(device)
    expected = parts_of(objective, model, images, targets)
    with torch.autocast(device.type, torch.bfloat16):
        parts = parts_of(objective, model, images, targets)
    parts.total.backward()
    assert {part.dtype for part in parts} == {torch.float32}
    assert_close(parts.cam, expected.cam, rtol=0.1, atol=0)
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    assert model.backbone[0].weight.grad.any()


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_are_float32_or_better(
    name: str, given_dtype: torch.dtype, expected: torch.dtype, device: torch.device
) -> None:
    images, targets, prototypes = (tensor.to(device) for tensor in sample_batch())
    model = TinyNet().to(device, given_dtype)
    objective = Objective(name, prototypes.float(), options=options_for(prototypes.cpu())).to(device)
    parts = parts_of(objective, model, images.to(given_dtype), targets)
    assert {part.dtype for part in parts} == {expected}
    parts.total.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_prototypes_are_a_copy_that_moves_with_the_loss_and_stays_out_of_checkpoints() -> None:
    prototypes = torch.rand(5, 4, 4)
    loss = BatchCAMLoss(prototypes)
    prototypes.zero_()
    assert loss.prototypes.any()
    assert loss.state_dict() == {}
    assert loss.double().prototypes.dtype == torch.float64


# --- errors ---------------------------------------------------------------------------------------

PROTOTYPES = torch.rand(5, 4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchCAMLoss(torch.rand(5, 1, 4, 4)), r"prototypes must have shape \(C, h, w\)"),
        (lambda: BatchCAMLoss(torch.rand(0, 4, 4)), r"prototypes must have shape \(C, h, w\)"),
        (lambda: PrototypeLoss(PROTOTYPES + 1), r"prototypes must lie in \[0, 1\]"),
        (lambda: PrototypeLoss(PROTOTYPES * float("nan")), r"prototypes must lie in \[0, 1\] and be finite"),
        (lambda: PrototypeLoss(PROTOTYPES.long()), "prototypes must be floating point, got torch.int64"),
        (lambda: PrototypeLoss(PROTOTYPES, "l3"), "unknown distance 'l3'"),
        (lambda: BatchCAMLoss(PROTOTYPES, "sim"), "unknown distance 'sim'; did you mean ssim"),
        (lambda: BatchCAMLoss(PROTOTYPES, reduction="mean"), "reduction must be one of .*, got 'mean'"),
        (lambda: BatchCAMLoss(PROTOTYPES, resize="both"), "resize must be one of cam, prototypes, got 'both'"),
        (lambda: PrototypeLoss(PROTOTYPES, cam_class="true"), "cam_class must be one of predicted, target"),
        (lambda: BatchCAMLoss(PROTOTYPES, ssim_exponents=(1, -1, 1)), "ssim_exponents must be three numbers ≥ 0"),
        (lambda: BatchCAMLoss(PROTOTYPES, ssim_exponents=(1, 1)), "ssim_exponents must be three numbers"),
        (lambda: ContrastiveCAMLoss(0), "margin must be a positive number, got 0"),
        (lambda: ContrastiveCAMLoss(-1.0), "margin must be a positive number, got -1.0"),
        (lambda: ContrastiveCAMLoss(float("nan")), "margin must be a positive number, got nan"),
        (lambda: PrototypeSupportLoss(torch.rand(5, 1, 4, 4)), r"prototypes must have shape \(C, h, w\)"),
        (
            lambda: PrototypeSupportLoss(PROTOTYPES * 0),
            "classes .* 0, 1, 2, 3, 4 are below the support 0.05 everywhere",
        ),
        (lambda: PrototypeSupportLoss(PROTOTYPES, 1e-9), "below the support 1e-09 everywhere or nowhere"),
        (lambda: PrototypeDepartureLoss(PROTOTYPES, PROTOTYPES[:4]), r"must have one shape, got \(5, 4, 4\) and \(4"),
        (
            lambda: PrototypeDepartureLoss(PROTOTYPES, 0.2 + 0.3 * PROTOTYPES),
            r"depart .* by 0.00 standard deviations at most, nowhere by more than --departure 0.36: name",
        ),
        (lambda: PrototypeDepartureLoss(PROTOTYPES, oracles.sample_means(PROTOTYPES), 1e-9), "everywhere by more than"),
        (
            lambda: Objective("pdl", PROTOTYPES),
            "pdl compares the prototypes with .* give the options their class_means",
        ),
        (lambda: Objective("bcpl", PROTOTYPES), "unknown objective 'bcpl'; did you mean bcpl_l"),
        (lambda: Objective("pl_l1", PROTOTYPES, weight=-1), "weights of the losses must not be negative, got -1"),
        (lambda: Objective("pl_l1", PROTOTYPES, class_weight=-2), "must not be negative, got 0.1 and -2"),
    ],
)
def test_bad_options_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


LOSSES = {
    "PrototypeLoss": PrototypeLoss(PROTOTYPES),
    "PrototypeLoss, target": PrototypeLoss(PROTOTYPES, cam_class="target"),
    "BatchCAMLoss": BatchCAMLoss(PROTOTYPES),
    "ContrastiveCAMLoss": ContrastiveCAMLoss(),
    "PrototypeSupportLoss": PrototypeSupportLoss(PROTOTYPES, 0.5),
    "MaskedGradCAMLoss": partial(MaskedGradCAMLoss(), masks=torch.ones(3, 10, 10)),
}
OF_INPUT_GRADIENTS = {
    "RightReasonsLoss": partial(RightReasonsLoss(), masks=torch.ones(3, 10, 10)),
    "PrototypeDepartureLoss": PrototypeDepartureLoss(PROTOTYPES, oracles.sample_means(PROTOTYPES).float()),
}
ALL_LOSSES = LOSSES | OF_INPUT_GRADIENTS


@pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 5]), "targets must lie in 0 … 4, got values from 0 to 5"),
        (torch.tensor([0, 1, -1]), "targets must lie in 0 … 4, got values from -1 to 1"),
        (torch.tensor([0.0, 1, 2]), "targets must be integers, got torch.float32"),
        (torch.tensor([0, 1]), r"targets must have shape \(3,\), got \(2,\)"),
    ],
)
def test_bad_targets_are_named(
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], targets: Tensor, message: str
) -> None:
    images = torch.rand(3, 1, 10, 10)
    with pytest.raises(ValueError, match=message):
        loss(*TinyNet()(images), targets, images)


@pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES)
@pytest.mark.parametrize(
    ("logits", "features", "message"),
    [
        (torch.rand(3), torch.rand(3, 2, 4, 4), r"logits must have shape \(N, C\), got \(3,\)"),
        (torch.rand(3, 5), torch.rand(3, 2), r"features must have shape \(N, K, H, W\), got \(3, 2\)"),
        (torch.rand(3, 5), torch.rand(4, 2, 4, 4), "logits are of 3 samples, features of 4"),
    ],
)
def test_bad_shapes_are_named(
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], logits: Tensor, features: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss(logits, features, torch.tensor([0, 1, 2]), torch.rand(3, 1, 10, 10))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_missing_graph_is_named(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    images, targets = torch.rand(3, 1, 10, 10), torch.tensor([0, 1, 2])
    logits, features = TinyNet()(images)
    with pytest.raises(ValueError, match="features are not in the autograd graph of the logits"):
        loss(logits, features.clone(), targets, images)
    with pytest.raises(ValueError, match="no autograd graph"):
        loss(logits.detach(), features.detach(), targets, images)


@pytest.mark.parametrize("loss", OF_INPUT_GRADIENTS.values(), ids=OF_INPUT_GRADIENTS)
def test_input_gradients_without_a_graph_from_the_images_are_named(loss: Callable[..., Tensor]) -> None:
    images, targets = torch.rand(3, 1, 10, 10), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="logits and images carry no autograd graph"):
        loss(*TinyNet()(images), targets, images)
    with pytest.raises(ValueError, match="images are not in the autograd graph of the logits"):
        loss(*TinyNet()(images), targets, images.requires_grad_())


@pytest.mark.parametrize("name", ["rrr", "rrr_g", "bcpl_l1+rrr_g"])
def test_missing_masks_are_named(name: str) -> None:
    images = torch.rand(3, 1, 10, 10, requires_grad=True)
    with pytest.raises(ValueError, match=rf"objective {re.escape(name)} needs masks \(N, h, w\)"):
        Objective(name, PROTOTYPES)(*TinyNet()(images), torch.tensor([0, 1, 2]), images)


@pytest.mark.parametrize("shape", [(3, 5, 5), (3, 1, 10, 10), (2, 10, 10)], ids=str)
@pytest.mark.parametrize("loss", [RightReasonsLoss(), MaskedGradCAMLoss()])
def test_masks_of_a_wrong_shape_are_named(loss: RightReasonsLoss | MaskedGradCAMLoss, shape: tuple[int, ...]) -> None:
    images = torch.rand(3, 1, 10, 10, requires_grad=True)
    with pytest.raises(ValueError, match=r"masks of 3 samples must have shapes \(N, ch, h, w\) and \(N, h, w\)"):
        loss(*TinyNet()(images), torch.tensor([0, 1, 2]), images, masks=torch.ones(shape))


@pytest.mark.parametrize(
    "loss",
    [
        *(PrototypeLoss(PROTOTYPES), BatchCAMLoss(PROTOTYPES), PrototypeSupportLoss(PROTOTYPES, 0.5)),
        OF_INPUT_GRADIENTS["PrototypeDepartureLoss"],
    ],
)
def test_prototypes_of_another_number_of_classes_are_named(loss: Callable[..., Tensor]) -> None:
    images = torch.rand(3, 1, 10, 10)
    with pytest.raises(ValueError, match=r"5 prototypes .* for logits of 6 classes"):
        loss(*TinyNet(num_classes=6)(images), torch.tensor([0, 1, 2]), images)


@pytest.mark.parametrize("shape", [(3, 10, 10), (2, 1, 10, 10)], ids=str)
def test_images_of_a_wrong_shape_are_named(shape: tuple[int, ...]) -> None:
    logits, features = TinyNet()(torch.rand(3, 1, 10, 10))
    for loss, wanted in (
        (ContrastiveCAMLoss(), "3, 1 or 3, h, w"),
        (OF_INPUT_GRADIENTS["PrototypeDepartureLoss"], "3, ch"),
    ):
        with pytest.raises(ValueError, match=rf"images must have shape \({wanted}"):
            loss(logits, features, torch.tensor([0, 1, 2]), torch.rand(shape))
