"""Sweeps in processes of their own, which are killed and interrupted."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="sweeps need Ray: pip install 'distributed-batchcam[tune]'")

import psutil
from launching import ROOT
from sweeping import (
    SHORT,
    assert_same_run,
    checkpointed,
    finish,
    log_of,
    processes_of,
    standing,
    start,
    trials,
    wait_for,
    write_space,
)

from distributed_batchcam.config import make_config
from distributed_batchcam.trainer import train


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def are_gone(processes: list[psutil.Process]) -> bool:
    return all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes)


def test_a_killed_driver_is_resumed_and_finished_trials_are_left_alone(tmp_path: Path) -> None:
    storage = tmp_path / "s"
    space = write_space(tmp_path, {"seed": [0, 1, 2]}, fixed={"epochs": 5})
    process = start("--space", space, "--storage", str(storage), "--max-concurrent", "1")
    # A trial is finished, and another has written a checkpoint.
    wait_for(
        lambda: (done := list(storage.glob("trials/*/summary.json"))) and len(checkpointed(storage, 1)) > len(done),
        "the second trial",
    )
    processes = family(process)
    process.kill()
    process.communicate()
    workers = [one for log in storage.glob("logs/*.log") for one in processes_of(log.read_text())]
    wait_for(lambda: are_gone([one for one in processes if one.pid in workers]), "the trials to end")
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.kill()  # agents of Ray outlive it for minutes
    before = {trial["id"]: trial for trial in trials(storage)}
    (first,) = [trial for trial in before.values() if trial["state"] == "finished"]
    stamps = {path: path.stat().st_mtime_ns for path in (storage / "trials" / first["name"]).rglob("*")}

    status, said, _ = finish(start("--storage", str(storage), "--resume"))
    assert status == 0
    assert "3 trials, 1 of them finished before" in said
    assert {path: path.stat().st_mtime_ns for path in (storage / "trials" / first["name"]).rglob("*")} == stamps
    after = trials(storage)
    assert all(trial["state"] == "finished" for trial in after)
    (begun,) = [t for t in after if before[t["id"]]["state"] == "running"]
    assert "resuming from" in log_of(storage, begun)
    train(make_config({**SHORT, "epochs": 5, "seed": begun["axes"]["seed"], "out": tmp_path / "undisturbed"}))
    assert_same_run(tmp_path / "undisturbed", storage / "trials" / begun["name"])


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_at_once_and_says_how_to_go_on(number: signal.Signals, expected: int, tmp_path: Path) -> None:
    storage = tmp_path / "s"
    space = write_space(tmp_path, {"seed": [0, 1]}, fixed={"epochs": 200})
    process = start("--space", space, "--storage", str(storage))
    wait_for(lambda: checkpointed(storage, 1), "a checkpoint")
    processes = family(process)
    listening = [
        connection.laddr.ip
        for one in processes
        if one.is_running()
        for connection in one.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    process.send_signal(number)
    status, said, error = finish(process, 60)
    assert status == expected
    assert f"the sweep goes on with: batchcam sweep --storage {storage} --resume" in said
    assert "Traceback" not in error
    wait_for(lambda: are_gone(processes), "Ray to end", 60)
    assert standing(storage)["counts"] == {"finished": 0, "stopped": 0, "failed": 0, "running": 0, "waiting": 2}
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}, "loopback alone"


def test_the_file_runs_by_its_path_from_anywhere(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tune/sweep.py"), "--space", "smoke", "--dry-run"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "6 trials, 18 epochs" in result.stdout


def test_no_cluster_at_an_address_is_one_line(tmp_path: Path) -> None:
    space = write_space(tmp_path, {"seed": [0]})
    status, _, error = finish(start("--space", space, "--storage", str(tmp_path / "s"), "--address", "127.0.0.1:1"))
    assert status == 2
    assert error.strip().splitlines()[-1].startswith("batchcam: error: no Ray cluster at 127.0.0.1:1")
    assert not (tmp_path / "s").exists()
