"""The benchmarks run at tiny sizes, compare like with like, and write what they say. No figure is judged here."""

import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from benchmarks import against_predecessor, cam_libraries, explain_speed, step_time, timing
from benchmarks.cam_libraries import agreement
from benchmarks.predecessor import HookableNetwork, gradcam_by_hooks, gradcam_by_hooks_alone, gradcam_by_loop
from benchmarks.timing import Bar, Spread, measure
from distributed_batchcam import PrototypeLoss, create_model, grad_cam
from distributed_batchcam.objectives import OBJECTIVES

Main = Callable[[Sequence[str]], None]
SMALL = ["--rounds", "2", "--warmup", "1", "--batch-size", "8", "--threads", "1", "--device", "cpu"]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def run(main: Main, path: Path, *options: str) -> dict[str, Any]:
    """What a benchmark writes at a tiny size."""
    main([*SMALL, "--json", str(path), *options])
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def check(document: dict[str, Any]) -> None:
    assert document["device"] == "cpu"
    assert document["threads"] == 1
    assert document["hardware"]["cpu"]
    assert document["hardware"]["cores"] == os.cpu_count()
    assert {"python", "torch", "timm", "distributed_batchcam"} <= document["versions"].keys()
    for table in document["tables"]:
        assert table["reference"] == table["rows"][0]["name"]
        for row in table["rows"]:
            for figures in (row["seconds"], row["ratio"]):
                assert figures["n"] == 2
                assert 0 < figures["min"] <= figures["q1"] <= figures["median"] <= figures["q3"] <= figures["max"]
        assert set(table["rows"][0]["ratio"].values()) == {1.0, 2}
    assert document["bars"]
    for bar in document["bars"]:
        assert bar["passed"] == "not measured", "a bar holds at its own batch size and threads only"


def test_step_time_times_every_objective_against_the_plain_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run(step_time.main, tmp_path / "new folder" / "steps.json", "--models", "simple_cnn")
    check(document)
    (table,) = document["tables"]
    assert [row["name"] for row in table["rows"]] == ["plain", *OBJECTIVES]
    printed = capsys.readouterr().out
    assert "bcpl_l1" in printed
    assert "not measured" in printed
    assert os.listdir(tmp_path / "new folder") == ["steps.json"]


def test_step_time_takes_any_model_and_some_objectives(tmp_path: Path) -> None:
    document = run(
        step_time.main, tmp_path / "steps.json", "--models", "simple_cnn", "resnet18", "--objectives", "bcpl_l1"
    )
    check(document)
    assert [[row["name"] for row in table["rows"]] for table in document["tables"]] == [["plain", "bcpl_l1"]] * 2


def test_against_predecessor_times_both_algorithms(tmp_path: Path) -> None:
    document = run(against_predecessor.main, tmp_path / "maps.json")
    check(document)
    names = [{row["name"] for row in table["rows"]} for table in document["tables"]]
    assert len(names) == 4
    assert all(against_predecessor.LOOP in table for table in names)
    assert against_predecessor.HOOKS in names[0]


def test_explain_speed_writes_what_it_compares_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds", "2", "--warmup", "1", "--threads", "1", "--device", "cpu", "--dataset", "digits"]
    path = tmp_path / "explain.json"
    explain_speed.main([*options, "--images", "6", "--json", str(path)])
    document = json.loads(path.read_text(encoding="utf-8"))
    check(document)
    references = [table["reference"] for table in document["tables"]]
    assert references == [explain_speed.PLAIN, explain_speed.DRAWN]
    assert os.listdir(tmp_path) == ["explain.json"], "the pictures are gone"


def test_explain_speed_without_the_data_set_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATCHCAM_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="2"):
        explain_speed.main([])
    assert "no folder" in capsys.readouterr().err


def need_cam_libraries() -> None:
    for module in cam_libraries.MODULES:
        pytest.importorskip(
            module, reason=f"{module} cannot be imported; pip install -e '.[comparisons]'", exc_type=ImportError
        )


def test_cam_libraries_compares_maps_and_times_every_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_cam_libraries()
    document = run(cam_libraries.main, tmp_path / "libraries.json", "--models", "simple_cnn")
    check(document)
    assert [[row["name"] for row in table["rows"]] for table in document["tables"]] == [
        [reference, *others] for reference, others in cam_libraries.COMPARISONS.items()
    ]
    first, *others = document["tables"]
    seconds = {row["name"]: row["seconds"] for row in first["rows"]}
    for table in others:
        assert all(seconds[row["name"]] == row["seconds"] for row in table["rows"]), "one run, three tables"
    assert set(cam_libraries.PACKAGES) <= document["versions"].keys()
    libraries = {name for name in seconds if name not in ("forward pass", "this package", "this package, resized")}
    assert document["agreement"]["simple_cnn"].keys() == libraries
    for found in document["agreement"]["simple_cnn"].values():
        assert 0.999 <= found["correlation"] <= 1.000001
        assert found["compared"] + found["constant"] == 8
    assert "maps correlated" in capsys.readouterr().out


def test_cam_libraries_times_nothing_where_maps_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need_cam_libraries()
    monkeypatch.setattr(cam_libraries, "grad_cam", lambda *args, **options: grad_cam(*args, **options).flip(1))
    with pytest.raises(SystemExit, match=r"torch-cam.*nothing was timed"):
        cam_libraries.main([*SMALL, "--models", "simple_cnn"])
    assert "÷" not in capsys.readouterr().out


def test_cam_libraries_that_are_not_there_end_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(SystemExit) as stopped:
        cam_libraries.main([*SMALL, "--models", "simple_cnn"])
    assert stopped.value.code == 2
    assert "error: pytorch_grad_cam cannot be imported" in capsys.readouterr().err


def test_maps_agree_up_to_scale_and_where_both_are_constant() -> None:
    ours = torch.rand(3, 4, 4)
    ours[1] = 0
    assert agreement(ours, 7 * ours) == (pytest.approx(1), 2, 1)


def test_maps_do_not_agree_where_they_differ_or_one_alone_is_constant() -> None:
    ours = torch.rand(3, 4, 4)
    with pytest.raises(ValueError, match=r"less than 0\.999"):
        agreement(ours, ours + 0.1 * torch.rand(3, 4, 4))
    theirs = ours.clone()
    theirs[1] = 0.5
    for pair in ((ours, theirs), (theirs, ours)):
        with pytest.raises(ValueError, match="1 of 3 images"):
            agreement(*pair)
    with pytest.raises(ValueError, match="nothing to compare"):
        agreement(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4))


@pytest.mark.parametrize("module", ["step_time", "against_predecessor", "cam_libraries"])
def test_results_name_neither_a_host_nor_a_path(module: str, tmp_path: Path) -> None:
    if module == "cam_libraries":
        need_cam_libraries()
    mains: dict[str, Main] = {
        "step_time": step_time.main,
        "against_predecessor": against_predecessor.main,
        "cam_libraries": cam_libraries.main,
    }
    models = [] if module == "against_predecessor" else ["--models", "simple_cnn"]
    text = json.dumps(run(mains[module], tmp_path / "out.json", *models))
    assert socket.gethostname() not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    "options",
    [["--rounds", "1"], ["--batch-size", "0"], ["--objectives", "bcpl"], ["--models", "resnet81"], ["--json"]],
    ids=" ".join,
)
def test_bad_options_end_with_status_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        step_time.main([*SMALL, *options])
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_gpu_that_is_not_there_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        against_predecessor.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_the_predecessors_maps_are_those_of_grad_cam(name: str, given: bool) -> None:
    model = create_model(name).double().eval()
    images = torch.rand(4, 1, 28, 28, dtype=torch.float64)
    classes = torch.tensor([3, 0, 3, 9]) if given else None
    logits, features, _ = model(images)
    expected = grad_cam(logits, features, classes)
    assert expected.any(), "empty maps tell nothing"
    hookable = HookableNetwork(model.network)
    assert_close(gradcam_by_loop(logits, features, classes), expected, **EXACT)
    assert_close(gradcam_by_hooks(hookable, images, classes), expected, **EXACT)
    assert_close(gradcam_by_hooks_alone(hookable, images, classes), expected, **EXACT)
    assert not hookable.target._forward_hooks
    assert not hookable.target._backward_hooks


def test_the_loops_maps_have_the_gradients_of_the_prototype_loss() -> None:
    model = create_model("simple_cnn").double()
    images, targets = torch.rand(4, 1, 28, 28, dtype=torch.float64), torch.tensor([3, 0, 3, 9])
    prototypes = torch.rand(10, 14, 14, dtype=torch.float64)
    logits, features, _ = model(images)
    looped = (gradcam_by_loop(logits, features) - prototypes[targets]).abs().mean()
    ours = PrototypeLoss(prototypes)(logits, features, targets)
    assert_close(looped, ours, **EXACT)
    weights = [model.network.conv1.weight, model.network.conv2.weight, model.network.fc1.weight]
    assert_close(torch.autograd.grad(looped, weights, retain_graph=True), torch.autograd.grad(ours, weights), **EXACT)


def test_variants_take_turns_and_the_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    order: list[str] = []

    def variant(name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            slow_start = 100.0 if name not in order else 1.0
            order.append(name)
            clock[0] += seconds * slow_start

        return work

    variants = {name: variant(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    table = measure("x", variants, rounds=20, warmup=1, device=torch.device("cpu"))
    turns = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert [sorted(turn) for turn in turns] == [["a", "b", "c"]] * 21
    assert len(set(turns[1:])) > 3, "each round has an order of its own"
    assert [row.seconds.median for row in table.rows] == [1, 2, 4]
    assert [row.ratio.max for row in table.rows] == [1, 2, 4]
    assert table.row("b").seconds == Spread(20, 2, 2, 2, 2, 2)


def test_a_bar_knows_its_direction() -> None:
    assert Bar("a", "at most", 1.15, 1.15).passed is True
    assert Bar("a", "at most", 1.15, 1.16).passed is False
    assert Bar("a", "at least", 50, 50).passed is True
    assert Bar("a", "at least", 50, 49).passed is False
    assert Bar("a", "at least", 50, None).passed == "not measured"
