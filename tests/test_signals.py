"""SIGTERM and SIGINT stop a run after a whole step."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import environment
from PIL import Image
from short_runs import assert_same_result, checkpoints_of, options_of_small, train

from distributed_batchcam import trainer
from distributed_batchcam.config import make_config
from distributed_batchcam.signals import DeferredSignals


def test_a_signal_stops_after_a_step_and_reaches_the_handler_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(tmp_path / "undisturbed", "--log-every", "4") == 0
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    step = trainer.Trainer.train_step

    def interrupted(self: trainer.Trainer, batch: Any) -> Any:
        if self.progress.step == 12:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch)

    config = make_config({**options_of_small(), "epochs": 2, "log_every": 4, "out": tmp_path / "run", "resume": "auto"})
    try:
        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "train_step", interrupted)
            with pytest.raises(SystemExit) as exit_:
                trainer.train(config)
        assert exit_.value.code == 143
        assert heard == [signal.SIGTERM]
        assert checkpoints_of(tmp_path / "run") == ["epoch_00000_step_00000013"]
        trainer.train(config)
        assert len(heard) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert_same_result(tmp_path / "run", tmp_path / "undisturbed")


def test_outside_the_main_thread_and_where_signals_are_ignored_no_handler_is_touched() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with DeferredSignals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    found: list[Any] = []

    def enter() -> None:
        with DeferredSignals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_process_group_leaves_the_decoders_to_the_main_process(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    folders, out = tmp_path / "images", tmp_path / "run"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 16, 16), dtype=np.uint8)
    for place, image in enumerate(pixels):
        folder = folders / f"class{place % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{place}.png")
    options = ["--dataset", "imagefolder", "--data-root", str(folders), "--cache-images", "no", "--workers", "2"]
    options += ["--image-size", "16", "--batch-size", "8", "--device", "cpu", "--epochs", "500", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "distributed_batchcam", "train", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        # Tests started in the background inherit an ignored SIGINT; a user's shell does not ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoints/epoch_00001").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)  # which waits for the decoders too, as they hold the pipe
    assert process.returncode == status, said
    assert len(said.strip().splitlines()) == 2, said
    assert "--resume auto" in said
    assert checkpoints_of(out)


SECOND = """
import os, signal, time
from distributed_batchcam.signals import DeferredSignals
with DeferredSignals() as signals:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


def test_signals_in_a_row_are_one_and_a_later_one_ends_the_process_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SECOND], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    process.communicate()
