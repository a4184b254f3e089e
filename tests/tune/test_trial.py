"""A trial by itself, with what it tells Tune written down instead."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ray", reason="sweeps need Ray: pip install 'distributed-batchcam[tune]'")

from distributed_batchcam.config import RunConfig
from distributed_batchcam.errors import InUseError
from tune import ranks
from tune.record import SweepRecord
from tune.space import Space, Trial
from tune.storage import Storage
from tune.trial import Settings, run_trial

SPACE = Space(fixed={"dataset": "digits", "epochs": 3}, grid={"seed": [0]})


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", told.append)
    return told


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    SweepRecord("mine", SPACE, {}).save(Storage(tmp_path))
    return Settings(SPACE, str(tmp_path), "mine", {})


@pytest.fixture
def trial() -> Trial:
    return SPACE.trials()[0]


def run_dir(settings: Settings, trial: Trial) -> Path:
    return Path(settings.storage) / "trials" / trial.name


def write_epochs(path: Path, epochs: int, *, finished: bool = False) -> None:
    path.mkdir(parents=True, exist_ok=True)
    lines = [{"split": "valid", "epoch": epoch, "accuracy": 50.0 + epoch} for epoch in range(1, epochs + 1)]
    text = "".join(json.dumps(line) + "\n" for line in [{"split": "train", "epoch": 1}, *lines])
    (path / "metrics.jsonl").write_text(text + '{"split": "val')  # cut off by a crash
    if finished:
        (path / "summary.json").write_text("{}")


def test_each_epoch_is_reported_and_the_last_one_when_the_run_is_finished(
    settings: Settings, trial: Trial, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_dir(settings, trial)
    seen: list[int] = []

    def train(config: RunConfig, on_epoch: Any, storage: Storage, name: str) -> None:
        assert (config.out, config.resume, config.seed, config.epochs) == (path, "auto", 0, 3)
        for epoch in (1, 2, 3):
            write_epochs(path, epoch)
            on_epoch({"epoch": epoch, "accuracy": 50.0 + epoch})
            seen.append(len(reports))
        write_epochs(path, 3, finished=True)

    monkeypatch.setattr(ranks, "train_on_all_ranks", train)
    run_trial({"axes": trial.axes}, settings)
    assert seen == [1, 2, 2], "a scheduler that stops at the last epoch must not keep the run from its summary"
    assert reports == [{"epoch": epoch, "valid_accuracy": 50.0 + epoch} for epoch in (1, 2, 3)]


def test_a_run_that_lacks_its_summary_alone_is_finished_before_its_last_epoch_is_reported(
    settings: Settings, trial: Trial, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_dir(settings, trial)
    write_epochs(path, 3)

    def train(*arguments: Any) -> None:
        assert [report["epoch"] for report in reports] == [1, 2]
        write_epochs(path, 3, finished=True)

    monkeypatch.setattr(ranks, "train_on_all_ranks", train)
    run_trial({"axes": trial.axes}, settings)
    assert [report["epoch"] for report in reports] == [1, 2, 3]


@pytest.mark.parametrize("finished", [True, False])
def test_what_was_done_before_is_reported_and_not_done_again(
    finished: bool, settings: Settings, trial: Trial, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "train_on_all_ranks", lambda *arguments: pytest.fail("trained again"))
    write_epochs(run_dir(settings, trial), 3, finished=finished)
    if not finished:
        settings.stopped[trial.id] = 2
    run_trial({"axes": trial.axes}, settings)
    assert [report["epoch"] for report in reports] == ([1, 2, 3] if finished else [1, 2])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory.\nTried"), FloatingPointError("the loss is not finite")]
)
def test_what_another_attempt_would_meet_again_is_reported_as_the_reason(
    error: Exception, settings: Settings, trial: Trial, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(ranks, "train_on_all_ranks", train)
    run_trial({"axes": trial.axes}, settings)
    assert reports == [{"epoch": 0, "valid_accuracy": 0.0, "failure": " ".join(str(error).split())}]


def test_a_run_that_an_earlier_attempt_still_holds_is_waited_for(
    settings: Settings, trial: Trial, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = run_dir(settings, trial), []

    def train(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise InUseError("in use by another process")
        write_epochs(path, 3, finished=True)

    monkeypatch.setattr(ranks, "train_on_all_ranks", train)
    run_trial({"axes": trial.axes}, settings)
    assert [report["epoch"] for report in reports] == [3]
    calls.clear()
    (path / "summary.json").unlink()
    monkeypatch.setattr("tune.trial.IN_USE_SECONDS", -1)
    run_trial({"axes": trial.axes}, settings)
    assert reports[-1]["failure"] == "in use by another process"


def test_anything_else_is_raised_for_tune_to_try_again(
    settings: Settings, trial: Trial, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: Any) -> None:
        raise OSError("connection reset")

    monkeypatch.setattr(ranks, "train_on_all_ranks", train)
    with pytest.raises(OSError, match="connection reset"):
        run_trial({"axes": trial.axes}, settings)
    assert reports == []


def test_a_folder_that_this_machine_does_not_share_is_said(
    settings: Settings, trial: Trial, reports: list[dict[str, Any]], tmp_path: Path
) -> None:
    for other in (
        Settings(SPACE, str(tmp_path / "elsewhere"), "mine", {}),
        Settings(SPACE, str(tmp_path), "yours", {}),
    ):
        run_trial({"axes": trial.axes}, other)
        assert "is not the same folder on" in reports.pop()["failure"]


def test_runs_of_a_sweep_are_one_group_on_wandb_and_each_has_its_id(trial: Trial) -> None:
    with_flag = Settings(SPACE, "s", "smoke-1", {"tracker": "wandb"}).run_config(trial)
    in_space = Space(fixed={"tracker": "wandb"}, grid={"seed": [0]})
    from_space = Settings(in_space, "s", "smoke-1", {}).run_config(in_space.trials()[0])
    for config, one in ((with_flag, trial), (from_space, in_space.trials()[0])):
        assert (config.tracker, config.group, config.tags) == ("wandb", "smoke-1", (f"trial-{one.id}",))
    assert Settings(SPACE, "s", "smoke-1", {}).run_config(trial).group is None
