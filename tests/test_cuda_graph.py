"""A training of one recorded step: the same as any other, on an emulated GPU and, where there is one, on a real one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda_graph import Graph
from short_runs import assert_same_result, cut_off, lines_of, train
from torch import Tensor
from tqdm import tqdm

from benchmarks import epoch_time, step_time
from benchmarks.step_time import Setting, training_steps
from distributed_batchcam import trainer
from distributed_batchcam.cli import run
from distributed_batchcam.config import make_config
from distributed_batchcam.cuda_graph import WARM_UP, GraphedPass
from distributed_batchcam.heartbeat import Heartbeat
from distributed_batchcam.objectives import OBJECTIVES
from distributed_batchcam.run_data import load_run_data
from distributed_batchcam.run_directory import RunDirectory
from distributed_batchcam.runtime import start_accelerator

STEPS = 6
CPU = torch.device("cpu")
ON_DECOYS = ("rrr", "rrr_g", "pdl")
OPTIONS: dict[str, dict[str, Any]] = {
    **{objective: {"objective": objective} for objective in [*OBJECTIVES, "bcpl_l1+psl"]},
    "sgd": {"optimizer": "sgd", "lr": 0.02, "clip_norm": 1.0},
    "bf16": {"precision": "bf16", "channels_last": True},
    "ema": {"ema": 0.9, "label_smoothing": 0.1},
    "sums": {"reduction": "sums", "resize": "prototypes"},
    "running statistics, a named layer": {"model": "resnet10t", "image_size": 8, "target_layer": "layer2"},
}


def train_epoch(out: Path, device: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One epoch of a training, without what follows it: what was logged of it, and the weights that count."""
    given = {"dataset": "digits", "image_size": 16, "batch_size": 200, **options}
    if given.get("objective") in ON_DECOYS:
        given["dataset"] = "decoy_digits"
        given["prototypes"] = clean_prototypes(out.parent)
    config = make_config({**given, "device": device, "out": out})
    accelerator = start_accelerator(config)
    data = load_run_data(config, accelerator)
    training = trainer.Trainer(
        config, accelerator, Heartbeat(accelerator, config.timeout), data, RunDirectory.choose(config)
    )
    training.open_run()
    training.train_epoch(tqdm(disable=True))
    training.close()
    assert training.progress.step == STEPS
    (line,) = lines_of(out)
    return line, training._weights_that_count().state_dict()


def clean_prototypes(folder: Path) -> Path:
    target = folder / "clean"
    if not target.exists():
        assert run(["prototypes", "--dataset", "digits", "--image-size", "16", "--out", str(target)]) == 0
    return target


@pytest.fixture
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_allow_cuda_graph", lambda config, accelerator: None)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.usefixtures("on_any_device")
def test_a_recorded_step_trains_as_any_other(
    options: dict[str, Any],
    tmp_path: Path,
    graphs: list[Graph],
) -> None:
    figures, weights = train_epoch(tmp_path / "plain", "cpu", options)
    assert not graphs
    same_figures, same_weights = train_epoch(tmp_path / "graph", "cpu", {**options, "cuda_graph": True})
    (graph,) = graphs
    assert graph.replays == STEPS - WARM_UP
    assert same_figures == figures
    for name, value in weights.items():
        assert torch.equal(same_weights[name], value), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_recorded_step_trains_as_any_other_on_a_gpu(options: dict[str, Any], tmp_path: Path) -> None:
    figures, _ = train_epoch(tmp_path / "plain", "cuda", options)
    same_figures, _ = train_epoch(tmp_path / "graph", "cuda", {**options, "cuda_graph": True})
    # Sums by atomic additions come in any order: not bit for bit.
    assert same_figures == pytest.approx(figures, rel=0.05)


@pytest.mark.usefixtures("on_any_device")
def test_a_run_resumes_with_a_graph_or_without_and_ends_the_same(tmp_path: Path, graphs: list[Graph]) -> None:
    options = ["--checkpoint-every", "10steps", "--keep-checkpoints", "99"]
    assert train(tmp_path / "undisturbed", *options, "--cuda-graph") == 0
    for name, graphed in (("anew", ["--cuda-graph"]), ("without", [])):
        copy = cut_off(tmp_path / "undisturbed", tmp_path / name, "epoch_00000_step_00000010")
        assert train(copy, *options, *graphed, "--resume", "auto") == 0
        assert_same_result(copy, tmp_path / "undisturbed")
    assert len(graphs) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--cuda-graph needs one process with a GPU, here: 1 on cpu; leave it out"),
        (["--accumulate", "2"], "--cuda-graph computes every gradient anew: leave --accumulate out"),
        (["--debug"], "--debug looks at every operation, a CUDA graph shows none: leave --cuda-graph out"),
    ],
)
def test_where_it_cannot_be_it_says_so(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", "--cuda-graph", *options) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_gradients_are_of_the_last_call_alone_and_kept_from_zero_grad(graphs: list[Graph]) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def square(factors: torch.Tensor) -> torch.Tensor:
        loss = (weight * factors).square().sum()
        loss.backward()
        return loss.detach()

    graphed = GraphedPass(square, [weight])
    given = [torch.tensor([1.0, float(number)]) for number in range(WARM_UP + 3)]
    for number, factors in enumerate(given):
        assert float(graphed(factors)) == 1 + (2 * number) ** 2
        assert weight.grad is not None
        assert weight.grad.tolist() == [2, 4 * number**2]
        if number % 2:  # as the optimizer's zero_grad does; the other gradients are left lying about
            weight.grad = None
    assert graphs[0].replays == 3
    assert [factors.tolist() for factors in given] == [[1, number] for number in range(WARM_UP + 3)]
    with pytest.raises(ValueError, match="recorded with"):
        graphed(torch.ones(1, 2))


def test_what_waits_for_the_device_is_not_recorded(graphs: list[Graph]) -> None:
    graphed = GraphedPass(lambda values: values.sum().item(), [])
    for _ in range(WARM_UP):
        graphed(torch.ones(2))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        graphed(torch.ones(2))


def test_a_benchmark_replays_the_step_that_it_would_run(graphs: list[Graph]) -> None:
    for objective in ("baseline", "bcpl_l1"):
        settings = (Setting(), Setting(cuda_graph=True))
        plain, graphed = (training_steps("simple_cnn", [objective], 8, CPU, setting)[objective] for setting in settings)
        for _ in range(WARM_UP + 2):
            plain()
            graphed()
        assert graphs.pop().replays == 2


@pytest.mark.parametrize(("benchmark", "value"), [(step_time.main, ["yes"]), (epoch_time.main, [])])
def test_a_benchmark_on_the_cpu_measures_no_graph(
    benchmark: Callable[[list[str]], None], value: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark(["--device", "cpu", "--cuda-graph", *value])
    assert stopped.value.code == 2
    assert "needs a GPU" in capsys.readouterr().err
