"""The benchmarks run at tiny sizes, compare like with like, and write what they say. No figure is judged here."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from benchmarks import (
    against_predecessor,
    cam_libraries,
    collective_traffic,
    epoch_time,
    explain_speed,
    gpu,
    memory,
    step_time,
    time_to_accuracy,
    timing,
)
from benchmarks.cam_libraries import agreement
from benchmarks.predecessor import HookableNetwork, gradcam_by_hooks, gradcam_by_hooks_alone, gradcam_by_loop
from benchmarks.timing import Bar, Spread, measure
from distributed_batchcam import PrototypeLoss, create_model, grad_cam
from distributed_batchcam.data import Loader, load_data
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
    assert document["hardware"]["instructions"] == torch.backends.cpu.get_cpu_capability()
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
    assert [row["name"] for row in table["rows"]] == ["plain", *step_time.USUAL_OBJECTIVES]
    assert set(OBJECTIVES) - set(step_time.USUAL_OBJECTIVES) == {"pdl", "rrr"}
    printed = capsys.readouterr().out
    assert "bcpl_l1" in printed
    assert "not measured" in printed
    assert os.listdir(tmp_path / "new folder") == ["steps.json"]


def test_step_time_takes_sums_and_what_differentiates_the_whole_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--models", "simple_cnn", "--objectives", "rrr", "pdl", "bcpl_l1+10psl+rrr_g"]
    document = run(step_time.main, tmp_path / "steps.json", *options)
    check(document)
    assert [row["name"] for row in document["tables"][0]["rows"]] == ["plain", "rrr", "pdl", "bcpl_l1+10psl+rrr_g"]
    for flags, message in (
        ([*options, "--compile", "yes"], "rrr differentiates the network twice: leave --compile out"),
        (["--models", "simple_cnn", "--objectives", "pls"], "unknown objective 'pls'; did you mean psl"),
    ):
        with pytest.raises(SystemExit, match="2"):
            step_time.main([*SMALL, *flags])
        assert message in capsys.readouterr().err


def test_the_masks_of_step_time_are_a_corner() -> None:
    masks = step_time.corner_masks(torch.rand(2, 3, 9, 9))
    assert masks.shape == (2, 9, 9)
    assert masks.sum((1, 2)).tolist() == masks[:, :4, :4].sum((1, 2)).tolist() == [16, 16]


def test_step_time_takes_any_model_and_some_objectives(tmp_path: Path) -> None:
    document = run(
        step_time.main, tmp_path / "steps.json", "--models", "simple_cnn", "resnet18", "--objectives", "bcpl_l1"
    )
    check(document)
    assert [[row["name"] for row in table["rows"]] for table in document["tables"]] == [["plain", "bcpl_l1"]] * 2


def test_step_time_runs_every_setting_and_the_fastest_of_both_is_compared(tmp_path: Path) -> None:
    options = ["--models", "simple_cnn", "--objectives", "bcpl_l1"]
    document = run(
        step_time.main, tmp_path / "steps.json", *options, "--precisions", "no", "bf16", "--channels-last", "no", "yes"
    )
    check(document)
    titles = [table["title"].rpartition(", ")[2] for table in document["tables"]]
    assert titles == ["float32", "float32 channels-last", "bf16", "bf16 channels-last"]
    slow, fast = (
        timing.Table.of("x", {"plain": [plain] * 2, "bcpl_l1": [ours] * 2}) for plain, ours in ((4, 5), (2, 6))
    )
    assert step_time.fastest([slow, fast], "plain") == 2
    assert step_time.fastest([slow, fast], "bcpl_l1") == 5


def test_against_predecessor_times_both_algorithms_against_both_ways(tmp_path: Path) -> None:
    document = run(against_predecessor.main, tmp_path / "maps.json")
    check(document)
    references = [table["reference"] for table in document["tables"]]
    general, closed = against_predecessor.GENERAL, against_predecessor.CLOSED_FORM
    assert references == [general, closed] * 3 + ["PrototypeLoss"]
    names = [{row["name"] for row in table["rows"]} for table in document["tables"]]
    assert all(against_predecessor.LOOP in table for table in names)
    assert against_predecessor.HOOKS in names[0]
    assert len(document["bars"]) == 4


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


# --- an epoch, memory, peak, collectives, time to accuracy ------------------------------------------

TINY = {
    name: ["--rounds", "2", "--threads", "1", "--device", "cpu", *benchmark.smoke]
    for name, benchmark in gpu.BENCHMARKS.items()
    if benchmark.smoke is not None
}


def smoke(name: str, tmp_path: Path) -> dict[str, Any]:
    """What a benchmark writes when it runs as `make bench-gpu` has it where no GPU is."""
    path = tmp_path / f"{name}.json"
    gpu.BENCHMARKS[name].main([*TINY[name], "--json", str(path)])
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def test_epoch_time_compares_epochs_of_both_ways_and_the_batches_alone(tmp_path: Path) -> None:
    document = smoke("epoch_time", tmp_path)
    check(document)
    assert [table["title"].split(",")[0] for table in document["tables"]] == [
        "an epoch with baseline",
        "an epoch with bcpl_l1",
        "an epoch of batches without training",
    ]
    for table in document["tables"]:
        assert [row["name"] for row in table["rows"]] == [epoch_time.OURS, epoch_time.USUAL]


def test_both_ways_of_an_epoch_see_the_same_pictures() -> None:
    data = load_data("digits", valid_size=0, limit=20)
    images, targets = next(iter(epoch_time.picture_loader(data, 20, 1, torch.device("cpu"))))
    (batch,) = Loader(data.train, 20, torch.device("cpu")).epoch()
    ours = data.normalize(batch.images)
    for image, target in zip(images, targets, strict=True):
        (place,) = torch.nonzero((ours - image).abs().amax((1, 2, 3)) < 1e-6).flatten().tolist()
        assert batch.targets[place] == target


def test_memory_compares_peaks(tmp_path: Path) -> None:
    document = smoke("memory", tmp_path)
    check(document)
    peaks = document["peak_bytes"]
    weights = 3 * 4 * 421_642  # with AdamW's two moments; the gradients come on top
    assert weights < peaks["plain"]["median"] < peaks["bcpl_l1"]["median"] < 3 * weights
    assert document["ratio"]["median"] == pytest.approx(peaks["bcpl_l1"]["median"] / peaks["plain"]["median"])


def test_the_peak_on_the_cpu_is_what_was_held_at_a_time() -> None:
    def work() -> None:
        held = torch.empty(1 << 20, dtype=torch.uint8)
        for _ in range(3):
            torch.empty(1 << 21, dtype=torch.uint8)
        del held

    assert memory._peak_on_cpu(work) == 3 << 20


def test_fraction_of_peak_compares_steps_with_a_matrix_product(tmp_path: Path) -> None:
    document = smoke("fraction_of_peak", tmp_path)
    check(document)
    (table,) = document["tables"]
    assert [row["name"] for row in table["rows"]] == ["matrix product", "plain", "bcpl_l1"]
    assert all(percent > 0 for percent in document["percent_of_matrix_product"].values())


def test_collectives_are_counted_as_the_design_says(tmp_path: Path) -> None:
    document = smoke("collective_traffic", tmp_path)
    check(document)
    c, k, hw = 10, 64, 14 * 14
    assert {row["reduction"]: row["bytes"] for row in document["traffic"]} == {
        "factored": [4 * c * (1 + k), 4 * c * hw, 4 * c * k],
        "sums": [4 * c * (1 + k + k * hw)],
    }
    (gloo,) = document["gloo"]
    assert [row["reduction"] for row in gloo["class_cams"]] == ["factored", "sums"]
    assert all(row["measured ÷ modelled"] > 0 for row in [*gloo["bare"], *gloo["class_cams"]])


def test_the_model_of_a_collective_is_fitted_to_what_it_models() -> None:
    latency, bandwidth, world = 3e-5, 2e9, 4
    hops = collective_traffic.ring_hops(world)
    bare = {
        size: collective_traffic.collective_seconds(size, hops, world, latency, bandwidth)
        for size in collective_traffic.BARE_BYTES
    }
    assert collective_traffic.fitted(bare, hops, world) == pytest.approx((latency, bandwidth), rel=1e-6)
    # A size that takes twice as long as the model has it must not spoil the fit of the others, large or small.
    for size in bare:
        found = collective_traffic.fitted({**bare, size: 2 * bare[size]}, hops, world)
        assert found == pytest.approx((latency, bandwidth), rel=0.5)
    assert (collective_traffic.ring_hops(4), collective_traffic.tree_hops(64)) == (6, 12)


def test_share_of_the_modelled_step_grows_with_the_bytes_and_the_latency() -> None:
    cluster = collective_traffic.CLUSTERS[0]
    share = collective_traffic.modelled_share(cluster, [1 << 20])
    assert 0 < share < collective_traffic.modelled_share(cluster, [1 << 24]) < 1
    assert share < collective_traffic.modelled_share(cluster._replace(latency=1e-3), [1 << 20])


@pytest.mark.slow
def test_time_to_accuracy_launches_a_run_and_watches_its_metrics() -> None:
    options = ["--dataset", "digits", "--valid-size", "0", "--epochs", "2", "--batch-size", "64", "--device", "cpu"]
    outcome = time_to_accuracy.run(options, 20.0, 1)
    assert outcome.reached
    assert outcome.seconds > 0.5, "a run has to import torch"
    assert outcome.last_accuracy > 20


def test_validations_are_read_as_they_come_and_until_the_process_ends(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    writer = (
        "import sys, time\n"
        "with open(sys.argv[1], 'w', buffering=1) as file:\n"
        '    for line in (\'{"split": "train"}\', \'{"split": "valid", "n": 1}\', \'{"split": "valid", "n": 2}\'):\n'
        "        print(line, file=file)\n"
        "        time.sleep(0.05)\n"
    )
    with subprocess.Popen([sys.executable, "-c", writer, str(file)]) as process:
        assert [line["n"] for line in time_to_accuracy.validations(file, process)] == [1, 2]


def test_time_to_accuracy_gives_each_round_a_seed_and_judges_the_share_that_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[Sequence[str]] = []

    def run_one(options: Sequence[str], accuracy: float, threads: int) -> time_to_accuracy.Outcome:
        commands.append(options)
        return time_to_accuracy.Outcome(10.0 + len(commands), len(commands) != 4, 98.0 + len(commands))

    monkeypatch.setattr(time_to_accuracy, "run", run_one)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    path = tmp_path / "seconds.json"
    time_to_accuracy.main(["--rounds", "2", "--datasets", "mnist", "--device", "cpu", "--json", str(path)])
    document = json.loads(path.read_text(encoding="utf-8"))
    seeds = [command[command.index("--seed") + 1] for command in commands]
    assert seeds == ["0", "0", "1", "1"]
    assert [bar["measured"] for bar in document["bars"]] == [1.0, 0.5]
    assert [bar["passed"] for bar in document["bars"]] == [True, False]
    assert document["last_accuracy"]["mnist"]["baseline"]["max"] == 101.0
    assert {command[command.index("--precision") + 1] for command in commands} == {"bf16"}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    time_to_accuracy.main(["--rounds", "2", "--datasets", "mnist", "--device", "cpu", "--json", str(path), "--lr", "1"])
    assert commands[-1][commands[-1].index("--precision") + 1] == "no"
    assert commands[-1][-2:] == ["--lr", "1"]
    document = json.loads(path.read_text(encoding="utf-8"))
    assert {bar["passed"] for bar in document["bars"]} == {"not measured"}, "not the recipe"


def test_a_run_that_fails_ends_time_to_accuracy_with_its_last_line() -> None:
    with pytest.raises(SystemExit, match="resnet81"):
        time_to_accuracy.run(["--model", "resnet81"], 99.0, 1)


def test_without_a_gpu_each_benchmark_has_a_smoke_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(["--only", "memory"])
    printed = capsys.readouterr().out
    assert "no GPU is visible here" in printed
    assert "not measured" in printed
    assert "passed" not in printed


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
