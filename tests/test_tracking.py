"""metrics.jsonl and trackers: nothing lost, nothing that stops a training."""

import json
import logging
from pathlib import Path

import pytest

from distributed_batchcam.config import RunConfig
from distributed_batchcam.tracking import TRACKERS, MetricsFile, SafeTracker


def test_each_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.log({"step": 1, "loss": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}


def test_a_resumed_run_drops_the_steps_that_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    metrics = MetricsFile(path, last_step=2)
    metrics.log({"step": 3, "again": True})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_failing_tracker_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        def __init__(self, config: RunConfig, run_dir: Path) -> None:
            self.calls = 0

        def log(self, metrics: object, step: int) -> None:
            self.calls += 1
            raise ConnectionError("gone\nfor good")

        def finish(self, summary: object) -> None:
            raise AssertionError("a tracker that failed is left alone")

    monkeypatch.setitem(TRACKERS, "wandb", Failing)
    tracker = SafeTracker(RunConfig(tracker="wandb"), tmp_path)
    with caplog.at_level(logging.WARNING):
        tracker.log({"loss": 1.0}, 1)
        tracker.log({"loss": 1.0}, 2)
        tracker.finish({})
    assert [record.getMessage() for record in caplog.records] == [
        "tracker wandb failed (gone); training goes on, metrics.jsonl has everything"
    ]


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = SafeTracker(RunConfig(tracker="tensorboard"), tmp_path)
    tracker.log({"train/loss": 0.25, "epoch": 1}, 3)
    tracker.finish({})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 0.25)]


def test_wandb_offline_keeps_a_run_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = SafeTracker(RunConfig(tracker="wandb"), tmp_path)
    tracker.log({"train/loss": 0.25}, 1)
    tracker.finish({"test_accuracy": 99.0})
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content
    assert b"test_accuracy" in content
