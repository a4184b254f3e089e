"""metrics.jsonl and trackers: nothing lost, nothing that stops a training, nothing that hangs."""

import json
import logging
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import ROOT, SMALL, environment, gloo, launch
from PIL import Image

from distributed_batchcam import cli, tracking
from distributed_batchcam.config import RunConfig
from distributed_batchcam.tracking import TRACKERS, MetricsFile, SafeTracker, wandb_tracker
from distributed_batchcam.tracking.panel import class_panel, panel_caption

KEY = "0123456789" * 4  # looks like one


def test_each_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.log({"step": 1, "loss": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}


def test_a_resumed_run_has_the_lines_of_its_checkpoint_and_drops_what_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    metrics = MetricsFile(path, ['{"step": 1}', '{"step": 2}'])
    metrics.log({"step": 3, "again": True})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_lines_that_could_not_be_written_follow_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run/metrics.jsonl"
    path.parent.mkdir()
    metrics = MetricsFile(path)
    metrics.log({"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path.unlink()  # and so begun anew
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("os.fsync", full)
        metrics.log({"step": 2})
        metrics.log({"step": 3})
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    metrics.log({"step": 4})
    metrics.log({"step": 5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_failing_tracker_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    called = []

    class Failing:
        def __init__(self, config: RunConfig, run_dir: Path, last_step: int | None) -> None:
            pass

        def log(self, metrics: object, step: int) -> None:
            called.append("log")
            raise ConnectionError("gone\nfor good")

        def finish(self, summary: object, files: object) -> None:
            called.append("finish")

        def close(self) -> None:
            called.append("close")
            raise ConnectionError("still gone")

    monkeypatch.setitem(TRACKERS, "wandb", Failing)
    tracker = SafeTracker(RunConfig(tracker="wandb"), tmp_path)
    with caplog.at_level(logging.WARNING):
        tracker.log({"loss": 1.0}, 1)
        tracker.log({"loss": 1.0}, 2)
        tracker.show_class_maps(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), ["a"], 2)
        tracker.finish({}, tmp_path)
        tracker.close()
        tracker.close()
    assert called == ["log", "close"]
    assert [record.getMessage() for record in caplog.records] == [
        "tracker wandb failed (gone); training goes on, metrics.jsonl has everything"
    ]


def test_panel_shows_prototypes_above_class_maps_in_bands_of_ten() -> None:
    maps = torch.zeros(12, 3, 3)
    maps[11] = 1
    panel = class_panel(maps, maps)
    side = 63  # 21 pixels for each of three
    assert panel.shape == (2 * 2 * side + 4, 10 * (side + 4) - 4, 3)
    assert panel.dtype == np.uint8
    band, column = 2 * side + 4, side + 4
    assert (panel[band : band + side, column : column + side] == 255).all()  # class 11's prototype: white
    assert (panel[band + side :, column : column + side] == [252, 254, 164]).all()  # inferno's brightest
    assert (panel[side : 2 * side, :side] == [0, 0, 3]).all()  # and its darkest
    assert (panel[band:, 2 * column - 4 :] == 255).all()  # no class there


def test_panel_of_many_large_classes_stays_small_and_says_what_is_left_out() -> None:
    maps = torch.full((101, 224, 224), torch.nan)
    assert class_panel(maps, maps).nbytes < 3e6
    caption = panel_caption(["a\nb\x1b[31m", *["c"] * 100])
    assert caption.startswith("prototypes above class maps, by row: a b[31m, c, c")
    assert caption.endswith("; the first 100 of 101 classes")


def test_tensorboard_gets_scalars_pictures_and_the_configuration(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = RunConfig(tracker="tensorboard", data_root=Path("/private/place"))
    for last_step in (None, 3):
        tracker = SafeTracker(config, tmp_path, last_step)
        for step in range(1 if last_step is None else 4, 6):
            tracker.log({"train/loss": 0.25 * step, "epoch": 1, "device": "cpu", "valid/ece": None}, step)
        tracker.show_class_maps(torch.rand(2, 8, 8), torch.rand(2, 8, 8), ["a", "b"], 5)
        tracker.finish({}, tmp_path)
        tracker.close()
        time.sleep(1)  # event files are named by the second
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (step, 0.25 * step) for step in range(1, 6)
    ]
    assert set(events.Tags()["scalars"]) == {"train/loss", "epoch"}
    assert events.Images("valid/class_maps")[-1].height == 128
    (text,) = events.Tensors("config/text_summary")
    assert b"objective: bcpl_l1" in text.tensor_proto.string_val[0]
    assert b"private" not in text.tensor_proto.string_val[0]


# W&B, by the files that it leaves ------------------------------------------------------------------------


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb_environment(monkeypatch, tmp_path, WANDB_MODE="offline")


def wandb_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **variables: str) -> None:
    """No login, no settings and no cache but those of the test."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name, value in {"HOME": str(home), "NETRC": str(home / "netrc"), **variables}.items():
        monkeypatch.setenv(name, value)


def records(folder: Path) -> Iterator[Any]:
    """Records of a run's file: after 7 bytes, blocks of 32 KiB of chunks (checksum, size, part of a record)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    content, position, data = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = -position % 32768
        if 0 < left < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        data += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = Record()
            record.ParseFromString(data)
            yield record
            data = b""


def items(updates: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in updates:
        *parents, name = item.nested_key or [item.key]
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = json.loads(item.value_json)
    return found


def history(folder: Path) -> dict[int, dict[str, Any]]:
    rows = [items(record.history.item) for record in records(folder) if record.HasField("history")]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    return {row["_step"]: row for row in rows}


def only(folder: Path, kind: str) -> Any:
    (found,) = (getattr(record, kind) for record in records(folder) if record.HasField(kind))
    return found


def summary(folder: Path) -> dict[str, Any]:
    return {
        key: value
        for record in records(folder)
        if record.HasField("summary")
        for key, value in items(record.summary.update).items()
    }


def offline_run(run_dir: Path) -> Path:
    (folder,) = run_dir.glob("wandb/offline-run-*")
    return folder


@pytest.mark.usefixtures("wandb_offline")
def test_a_whole_run_is_in_the_offline_files_of_wandb(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ("--epochs", "2", "--log-every", "10", "--group", "sweep 1", "--tags", "first", "a b")
    assert cli.run(["train", *SMALL, *options, "--tracker", "wandb", "--out", str(out)]) == 0
    folder = offline_run(out)
    said = capfd.readouterr()
    assert f"batchcam: this sends the run to W&B: wandb sync {folder}\n" in said.out
    assert "wandb:" not in said.out + said.err

    run = only(folder, "run")
    assert (run.project, run.display_name) == ("batchcam", "run")
    assert (run.run_group, list(run.tags)) == ("sweep 1", ["first", "a b"])
    assert run.run_id == (out / "wandb-run-id.txt").read_text().strip()
    config = items(run.config.update)
    assert (config["objective"], config["batch_size"], config["warmup"], config["prototypes"]) == (
        *("bcpl_l1", 64, 0.1, False),
    )
    assert not config.keys() & {"data_root", "out", "group", "tags"}

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = history(folder)
    assert list(rows) == [10, 20, 30, 40]
    not_sent = {"step", "epoch", "split", "time"}
    for line in lines:
        sent = {f"{line['split']}/{name}": value for name, value in line.items() if name not in not_sent}
        assert sent.keys() >= {f"{line['split']}/loss"}
        row = rows[line["step"]]
        assert {name: row[name] for name, value in sent.items() if value is not None} == pytest.approx(
            {name: value for name, value in sent.items() if value is not None}
        )
        assert row["epoch"] == line["epoch"]
    parts = {"loss", "loss_class", "loss_cam", "lr", "images_per_second", "accuracy"}
    assert rows[10].keys() >= {f"train/{name}" for name in parts}

    for step in (20, 40):
        panel = rows[step]["valid/class_maps"]
        assert panel["caption"] == "prototypes above class maps, by row: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
        with Image.open(folder / "files" / panel["path"]) as image:
            assert image.size == (10 * 68 - 4, 128)

    final = json.loads((out / "summary.json").read_text())
    sent = summary(folder)
    assert {name: sent[name] for name in final if final[name] is not None} == {
        name: value for name, value in final.items() if value is not None
    }
    assert sent["test/accuracy"] == pytest.approx(final["test_accuracy"])

    artifact = only(folder, "artifact")
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert files.keys() == {name for name in tracking.ARTIFACTS if (out / name).exists()}
    assert files.keys() >= {"config.yaml", "summary.json", "model.safetensors", "prototypes.safetensors"}
    assert all(path.read_bytes() == (out / name).read_bytes() for name, path in files.items())
    assert only(folder, "exit").exit_code == 0


@pytest.mark.slow
def test_without_network_two_processes_leave_one_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 refuses connections.
    refused = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "1"}
    wandb_environment(monkeypatch, tmp_path, **refused)
    out = tmp_path / "run"
    result = launch(
        *("train", *SMALL, "--epochs", "1", "--tracker", "wandb", "--out", str(out)), flags=gloo(2), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert history(offline_run(out)).keys() == {20}
    assert result.stdout.count(f"this sends the run to W&B: wandb sync {offline_run(out)}") == 1
    assert result.stderr.count("tracker wandb: W&B cannot be had online") == 1
    assert not (tmp_path / "wandb").exists()
    assert not [path for path in out.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def tracked(
    run_dir: Path, steps: range, last_step: int | None = None, config: RunConfig | None = None, *, finish: bool = True
) -> float:
    """Log one figure in each step; how many seconds the end took."""
    run_dir.mkdir(exist_ok=True)
    tracker = SafeTracker(config or RunConfig(tracker="wandb"), run_dir, last_step)
    for step in steps:
        tracker.log({"train/loss": 1 / step}, step)
    start = time.monotonic()
    if finish:
        tracker.finish({"test_accuracy": 99.0}, run_dir)
    tracker.close()
    return time.monotonic() - start


@pytest.mark.usefixtures("wandb_offline")
def test_a_resumed_run_goes_on_as_the_same_wandb_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_tracker, "CLOSE_SECONDS", 100)  # on a busy machine W&B takes more than ten to start
    run_dir = tmp_path / "a run"
    tracked(run_dir, range(1, 6), finish=False)
    tracked(run_dir, range(4, 9), last_step=3)
    first, second = sorted(run_dir.glob("wandb/offline-run-*"))
    assert only(first, "run").run_id == only(second, "run").run_id
    assert (only(first, "run").resume, only(second, "run").resume) == (False, True)  # sync appends what is resumed
    assert only(first, "exit").exit_code == 1
    assert list(history(second)) == [4, 5, 6, 7, 8]
    said = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(said.partition("W&B: ")[2]) == ["wandb", "sync", str(first), str(second)]


def test_the_environment_of_wandb_goes_before_our_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    variables = {"PROJECT": "mine", "ENTITY": "team", "NAME": "it", "RUN_GROUP": "all", "TAGS": "x,y", "RUN_ID": "r1"}
    wandb_environment(
        monkeypatch,
        tmp_path,
        **{f"WANDB_{name}": value for name, value in variables.items()},
        WANDB_MODE="offline",
        WANDB_DIR=str(elsewhere),
    )
    elsewhere.mkdir()
    tracked(tmp_path / "one", range(1, 2))
    run = only(offline_run(elsewhere), "run")
    found = (run.project, run.entity, run.display_name, run.run_group, list(run.tags), run.run_id)
    assert found == ("mine", "team", "it", "all", ["x", "y"], "r1")
    monkeypatch.setenv("WANDB_RUN_ID", "r2")
    tracked(tmp_path / "two", range(1, 2), config=RunConfig(tracker="wandb", group="ours", tags=("z",)))
    (folder,) = elsewhere.glob("wandb/offline-run-*-r2")
    assert (only(folder, "run").run_group, list(only(folder, "run").tags)) == ("ours", ["z"])


def test_wandb_switched_off_by_its_variable_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    wandb_environment(monkeypatch, tmp_path, WANDB_MODE="disabled")
    tracked(tmp_path / "run", range(1, 3))
    assert not list(tmp_path.rglob("*.wandb"))
    assert capsys.readouterr().out == ""
    assert not caplog.records


# W&B, when things go wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "No API key configured. Use `wandb login` to log in."),
        ({"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid: API key must have 40+ characters, has 5."),
    ],
    ids=["no login", "no key"],
)
def test_without_login_the_run_is_kept_offline(
    variables: dict[str, str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    wandb_environment(monkeypatch, tmp_path, **variables)
    assert tracked(tmp_path / "run", range(1, 4)) < 20
    folder = offline_run(tmp_path / "run")
    assert history(folder).keys() == {1, 2, 3}
    assert summary(folder)["test_accuracy"] == 99
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning.startswith(f"tracker wandb: W&B cannot be had online ({reason}")
    assert capsys.readouterr().out.splitlines()[-1] == f"batchcam: this sends the run to W&B: wandb sync {folder}"


def services_of(pid: int) -> list[int]:
    """W&B's service processes of the process `pid`."""
    found = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        with status.open("rb") as file:
            words = file.read().split(b"\0")
        if words[0].endswith(b"wandb-core") and str(pid).encode() in words:
            found.append(int(status.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds W&B's service in /proc")
@pytest.mark.usefixtures("wandb_offline")
def test_training_goes_on_when_the_service_of_wandb_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tracker = SafeTracker(RunConfig(tracker="wandb"), tmp_path)
    tracker.log({"train/loss": 1.0}, 1)
    process = tracker._tracker._process  # type: ignore[union-attr]
    wait_until(lambda: services_of(process.pid) and list(tmp_path.glob("wandb/offline-run-*/files/requirements.txt")))
    for pid in services_of(process.pid):
        os.kill(pid, signal.SIGKILL)
    step = 2

    def failed() -> bool:
        nonlocal step
        step += 1
        tracker.log({"train/loss": 1.0}, step)
        return bool(caplog.records)

    wait_until(failed)
    start = time.monotonic()
    tracker.finish({}, tmp_path)
    tracker.close()
    assert time.monotonic() - start < 30  # not the 150 that a service that lives may take
    (warning,) = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"tracker wandb failed \(.+\); training goes on, metrics.jsonl has everything", warning)
    assert f"wandb sync {offline_run(tmp_path)}" in capsys.readouterr().out


def wait_until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


FAKE_WANDB = """
import os, sys, time
from types import SimpleNamespace as Some
class Settings:
    model_fields = {}
    def __init__(self, **given): pass
def setup():
    return Some(settings=Some(project=None, run_name=None))
class Run:
    disabled, offline, step, id, url = False, False, 0, "fake", "https://wandb.example/fake"
    summary = {}
    def __init__(self, dir):
        self.dir = dir + "/wandb/run-1-fake/files"
        os.makedirs(self.dir)
    def log(self, *given, **named):
        if "error" in os.environ["FAKE"]: print("wandb: ERROR Fatal error while uploading data.", file=sys.stderr)
    def log_artifact(self, artifact): pass
    def finish(self, exit_code):
        if "hang" in os.environ["FAKE"]: time.sleep(1000)
def teardown():
    pass
def init(dir, mode=None, **given):
    if "stuck" in os.environ["FAKE"]: time.sleep(1000)
    if "broken" in os.environ["FAKE"]: raise OSError("no space left")
    return Run(dir)
"""


@pytest.mark.parametrize(
    ("fault", "warning", "synced"),
    [
        ("hang", "tracker wandb failed (W&B did not finish in 1 seconds)", False),
        ("stuck", "tracker wandb failed (W&B did not finish in 1 seconds)", None),
        ("broken", "tracker wandb failed (no space left)", None),
        ("error", "tracker wandb: wandb: ERROR Fatal error while uploading data.", False),
        ("none", "", True),
    ],
)
def test_every_wait_for_wandb_ends(
    fault: str,
    warning: str,
    synced: bool | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.setenv("PYTHONPATH", str(modules))
    monkeypatch.setenv("FAKE", fault)
    monkeypatch.setattr(wandb_tracker, "FINISH_SECONDS", 1)
    seconds = tracked(tmp_path / "run", range(1, 4))
    assert seconds < 5
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == ([warning] if warning else [])
    said = capsys.readouterr().out
    assert ("batchcam: W&B run https://wandb.example/fake" in said) == (synced is not None)
    assert ("this sends the run to W&B" in said) == (synced is False)


def test_without_wandb_installed_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_tracker, "find_spec", lambda name: None)
    tracked(tmp_path, range(1, 3))
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "pip install 'distributed-batchcam[wandb]'" in warning


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.usefixtures("wandb_offline")
def test_a_stopped_training_keeps_its_exit_status_and_what_was_logged(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "distributed_batchcam", "train", *SMALL, "--epochs", "500", "--log-every", "1"]
    process = subprocess.Popen(
        [*command, "--tracker", "wandb", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    try:
        wait_until(lambda: list(out.glob("wandb/offline-run-*/files/media/images/valid/*.png")))
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    folder = offline_run(out)
    assert (f"wandb sync {folder}" in said) == (number != signal.SIGKILL)
    # The process that writes for W&B outlives even a killed training, and ends the run in order.
    wait_until(lambda: any(record.HasField("exit") for record in records(folder)))
    assert only(folder, "exit").exit_code == 1
    assert len(history(folder)) >= 20
