"""Several processes: they are several, they follow one loss curve, and they end well."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launching import SMALL, batchcam, environment, gloo, launch

RUN = [*SMALL, "--epochs", "2", "--log-every", "2"]


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run on one, two and three processes."""
    folder = tmp_path_factory.mktemp("runs")
    outputs = {}
    for processes in (1, 2, 3):
        out = folder / str(processes)
        result = launch("train", *RUN, "--out", str(out), flags=gloo(processes))
        assert result.returncode == 0, result.stderr
        first_line = result.stdout.splitlines()[0]
        expected = "1 process on cpu" if processes == 1 else f"{processes} processes on cpu (gloo)"
        assert first_line == f"batchcam: {expected}"
        outputs[processes] = out
    return outputs


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_follows_one_loss_curve(runs: dict[int, Path], processes: int) -> None:
    one, many = lines_of(runs[1]), lines_of(runs[processes])
    assert [line["step"] for line in one] == [line["step"] for line in many]
    for a, b in zip(one, many, strict=True):
        # float32 sums in another order; the early steps, before differences grow, are held to rounding.
        tolerance = 1e-5 if a["step"] <= 4 else 2e-2
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
        if "loss_cam" in a:
            assert b["loss_cam"] == pytest.approx(a["loss_cam"], rel=tolerance)
    summaries = [json.loads((runs[n] / "summary.json").read_text()) for n in (1, processes)]
    assert [summary["world_size"] for summary in summaries] == [1, processes]
    assert summaries[0]["test_accuracy"] == pytest.approx(summaries[1]["test_accuracy"], abs=1.5)
    assert summaries[0]["class_cam_ssim"] == pytest.approx(summaries[1]["class_cam_ssim"], abs=0.02)


def test_a_checkpoint_of_two_processes_resumes_on_one(runs: dict[int, Path], tmp_path: Path) -> None:
    import shutil

    from distributed_batchcam.cli import run

    copy = tmp_path / "copy"
    shutil.copytree(runs[2], copy)
    shutil.rmtree(copy / "checkpoints/epoch_00002")
    assert run(["train", *RUN, "--out", str(copy), "--resume", "auto"]) == 0
    for a, b in zip(lines_of(runs[2]), lines_of(copy), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)


def test_evaluation_on_two_processes_counts_every_sample_once(runs: dict[int, Path]) -> None:
    figures = {}
    for processes in (1, 2):
        result = launch("evaluate", str(runs[1]), "--device", "cpu", "--subset", "10", flags=gloo(processes))
        assert result.returncode == 0, result.stderr
        figures[processes] = json.loads((runs[1] / "evaluation-test.json").read_text())
    assert figures[1]["samples"] == figures[2]["samples"] == 359
    assert figures[1]["accuracy"] == figures[2]["accuracy"]
    for name in ("loss", "cam_l1", "cam_ssim", "class_cam_ssim"):
        assert figures[2][name] == pytest.approx(figures[1][name], rel=1e-5)


def test_the_flags_of_the_readme_start_two_processes(tmp_path: Path) -> None:
    flags = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
        "--num_cpu_threads_per_process 1 --main_process_port 0"
    )
    result = launch(
        *("train", *SMALL, "--epochs", "1", "--out", str(tmp_path / "run")),
        flags=flags.split(),
        ACCELERATE_USE_CPU="true",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "batchcam: 2 processes on cpu (gloo)"


def test_a_launcher_that_degrades_to_one_process_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = launch("train", *SMALL, "--out", str(out), flags=["--cpu", "--num_processes", "2"])
    assert result.returncode != 0
    assert "batchcam: error: accelerate launch was asked for several processes but started one" in result.stderr
    assert not out.exists()


def test_bad_input_on_two_processes_is_said_once_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = launch("train", *SMALL, "--batch-size", "100000", "--out", str(out), flags=gloo(2))
    assert result.returncode != 0
    assert result.stderr.count("batchcam: error: --batch-size 100000 is larger than the training set") == 1
    assert "InputError" not in result.stderr, "a launcher's own traceback names its own error"
    assert not out.exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_its_status_and_the_run_goes_on_later(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ["train", *SMALL, "--epochs", "6", "--out", str(out)]
    command = [sys.executable, "-m", "distributed_batchcam", *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # Tests started in the background inherit an ignored SIGINT; a user's shell does not ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoints/epoch_00001").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert said.strip().startswith("batchcam: ")
    assert "--resume auto" in said
    assert "Traceback" not in said
    assert not (out / "summary.json").exists()
    result = batchcam(*options, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    assert [line["epoch"] for line in lines_of(out) if line["split"] == "valid"] == [1, 2, 3, 4, 5, 6]
