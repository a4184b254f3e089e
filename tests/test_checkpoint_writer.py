"""When checkpoints are due, and disks that are full or gone."""

import os
from pathlib import Path
from typing import Any

import pytest
from short_runs import assert_same_result, checkpoints_of, options_of_small, train

from distributed_batchcam import trainer
from distributed_batchcam.checkpoint_writer import CheckpointSchedule, CheckpointWriter, keep_trying
from distributed_batchcam.cli import run
from distributed_batchcam.config import Interval, make_config
from distributed_batchcam.errors import InputError, RunFault
from distributed_batchcam.run_directory import RunDirectory
from distributed_batchcam.run_lock import NAME
from distributed_batchcam.training_state import Progress


def test_checkpoints_are_due_by_steps_seconds_or_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    by_steps, by_clock, by_epochs = (
        CheckpointSchedule(Interval(amount, unit)) for amount, unit in ((3, "step"), (5, "s"), (2, "epoch"))
    )
    assert [step for step in range(1, 10) if by_steps.after_step(Progress(step=step))] == [3, 6, 9]
    assert [by_epochs.after_epoch(Progress(epoch=epoch)) for epoch in (1, 2, 3, 4)] == [False, True, False, True]
    assert not by_epochs.after_step(Progress(step=2, epoch=2))
    due = []
    for now[0] in (104.0, 105.0, 109.0, 110.0):
        due.append(by_clock.after_step(Progress()))
        if due[-1]:
            by_clock.saved()
    assert due == [False, True, False, True]


@pytest.mark.parametrize(
    "text", ["5", "0s", "1.5s", "-1steps", "s", "5 s", "5minutes", "1epochs\n", "٣s", "9999999999s"]
)
def test_a_strange_interval_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="needs a number and a unit: 500s, 200steps or 1epoch"):
        make_config({"checkpoint_every": text})


@pytest.mark.parametrize(
    ("text", "interval"),
    [("500s", (500, "s")), ("1step", (1, "step")), ("200steps", (200, "step")), ("2epochs", (2, "epoch"))],
)
def test_an_interval_is_a_number_and_a_unit(text: str, interval: tuple[int, str]) -> None:
    assert make_config({"checkpoint_every": text}).checkpoint_interval == interval


class FullDisk:
    """fsync fails while it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self._fsync = os.fsync
        monkeypatch.setattr("os.fsync", self._write)

    def _write(self, descriptor: int) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self._fsync(descriptor)


def test_a_checkpoint_that_cannot_be_written_costs_one_warning_and_no_other_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, said = FullDisk(monkeypatch), []
    writer = CheckpointWriter(RunDirectory(tmp_path, resumed=False), 2, said.append)
    state = {"config": make_config({}).model_dump(mode="json")}
    for epoch, disk.full in enumerate((False, True, True, False), start=1):
        writer.save(f"epoch_{epoch:05d}", state, best_epoch=1)
        writer.wait()
    assert checkpoints_of(tmp_path) == ["epoch_00001", "epoch_00004"]
    assert len(said) == 1
    assert said[0].startswith("checkpoint epoch_00002 could not be written (No space left on device): training goes on")
    disk.full = True
    monkeypatch.setattr("distributed_batchcam.checkpoint_writer.RETRY_SECONDS", 0.01)
    writer.save("epoch_00005", state, best_epoch=1)
    assert not writer.insist(0.05)
    disk.full = False
    assert writer.insist(0.05)
    assert "epoch_00005" in checkpoints_of(tmp_path)
    writer.close()


def test_what_fails_in_the_thread_other_than_for_the_disk_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDirectory, "write_checkpoint", lambda *_, **__: 1 / 0)
    writer = CheckpointWriter(RunDirectory(tmp_path, resumed=False), 2, print)
    writer.save("epoch_00001", {}, 1)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.close()


def test_last_files_wait_for_the_disk_and_give_up_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_batchcam.checkpoint_writer.RETRY_SECONDS", 0.01)
    tries, said = [], []

    def write() -> None:
        tries.append(1)
        if len(tries) < 4:
            raise OSError(28, "No space left on device")

    keep_trying(write, "the results", 10, said.append)
    assert len(tries) == 4
    assert said == [
        "the results cannot be written (No space left on device): make room or bring the folder back, it is tried "
        "again for 10 s"
    ]
    with pytest.raises(RunFault, match=r"the results cannot be written \(No space left on device\); once it can"):
        keep_trying(write_to_full, "the results", 0.05, said.append)


def write_to_full() -> None:
    raise OSError(28, "No space left on device")


def test_a_run_directory_that_vanishes_comes_back_with_the_next_checkpoint(tmp_path: Path) -> None:
    assert train(tmp_path / "undisturbed") == 0
    gone = tmp_path / "run"

    def vanish(figures: dict[str, Any]) -> None:
        if figures["epoch"] == 1:
            gone.rename(tmp_path / "moved")

    trainer.train(make_config({**options_of_small(), "epochs": 2, "out": gone}), vanish)
    assert (gone / NAME).exists(), "it is locked anew"
    assert_same_result(gone, tmp_path / "undisturbed")
    assert run(["evaluate", str(gone), "--device", "cpu", "--subset", "1"]) == 0


def test_an_unwritable_folder_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FullDisk(monkeypatch).full = True
    assert train(tmp_path / "run") == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
