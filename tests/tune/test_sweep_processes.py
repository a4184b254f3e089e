"""Sweeps in processes of their own, which are killed, interrupted and run on simulated clusters of several nodes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="sweeps need Ray: pip install 'distributed-batchcam[tune]'")

import psutil
from launching import ROOT, environment
from sweeping import SHORT, assert_same_run, log_of, processes_of, standing, trials, wait_for, write_space

from distributed_batchcam.config import make_config
from distributed_batchcam.trainer import train


def start(*arguments: str, **extra: str) -> "subprocess.Popen[str]":
    """`batchcam sweep …`."""
    return subprocess.Popen(
        [sys.executable, "-m", "tune.sweep", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(**extra),
        # Tests started in the background inherit an ignored SIGINT; a user's shell does not ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: "subprocess.Popen[str]", seconds: float = 300) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=seconds)
    return process.returncode, out, error


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def are_gone(processes: list[psutil.Process]) -> bool:
    return all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes)


def checkpoints(storage: Path, epoch: int) -> list[Path]:
    """Of this epoch; older ones than the newest two are removed."""
    return list(storage.glob(f"trials/*/checkpoints/epoch_{epoch:05d}"))


def test_a_killed_driver_is_resumed_and_finished_trials_are_left_alone(tmp_path: Path) -> None:
    storage = tmp_path / "s"
    space = write_space(tmp_path, {"seed": [0, 1, 2]}, fixed={"epochs": 5})
    process = start("--space", space, "--storage", str(storage), "--max-concurrent", "1")
    wait_for(lambda: list(storage.glob("trials/*/summary.json")) and checkpoints(storage, 1), "the second trial")
    processes = family(process)
    process.kill()
    process.communicate()
    workers = [one for log in storage.glob("logs/*.log") for one in processes_of(log.read_text())]
    assert wait_for(lambda: are_gone([one for one in processes if one.pid in workers]), "the trials to end", 30)
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
    wait_for(lambda: checkpoints(storage, 1), "a checkpoint")
    processes = family(process)
    listening = [
        connection.laddr.ip
        for one in processes
        if one.is_running()
        for connection in one.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    process.send_signal(number)
    status, said, error = finish(process, 30)
    assert status == expected
    assert f"the sweep goes on with: batchcam sweep --storage {storage} --resume" in said
    assert "Traceback" not in error
    assert wait_for(lambda: are_gone(processes), "Ray to end", 30)
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


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A head without GPUs, and two nodes with one logical GPU each, all on this machine."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    cluster.gpu_nodes = [cluster.add_node(num_cpus=4, num_gpus=1) for _ in range(2)]
    yield cluster
    cluster.shutdown()


def on_cluster(cluster: Any, space: str, storage: Path, *flags: str) -> "subprocess.Popen[str]":
    return start(
        *("--space", space, "--storage", str(storage), "--address", cluster.address, *flags), RAY_AUTH_MODE="disabled"
    )


def most_at_a_time(process: "subprocess.Popen[str]", storage: Path) -> int:
    """The most trials that ran at a time, until the sweep ends."""
    most = 0

    def look() -> bool:
        nonlocal most
        if (storage / "sweep.json").exists():
            most = max(most, standing(storage)["counts"]["running"])
        return process.poll() is not None

    wait_for(look, "the sweep to end", 400)
    return most


def test_trials_are_placed_by_gpu_and_shares_pack(cluster: Any, tmp_path: Path) -> None:
    space = write_space(tmp_path, {"seed": [0, 1, 2, 3, 4]}, fixed={"epochs": 2})
    process = on_cluster(cluster, space, tmp_path / "half", "--gpus-per-worker", "0.5")
    most = most_at_a_time(process, tmp_path / "half")
    status, said, error = finish(process)
    assert status == 0, error
    assert "each trial has 1 worker with 1 CPU and 0.5 GPUs" in said
    assert most == 4, "two GPUs hold four halves, never more"

    space = write_space(tmp_path, {"seed": [0, 1, 2]}, fixed={"epochs": 2})
    process = on_cluster(cluster, space, tmp_path / "whole")
    most = most_at_a_time(process, tmp_path / "whole")
    status, said, error = finish(process)
    assert status == 0, error
    assert "each trial has 1 worker with 1 CPU and 1 GPU" in said, "a GPU per worker, where there are any"
    assert most == 2

    process = on_cluster(cluster, space, tmp_path / "no", "--gpus-per-worker", "2", "--wait", "3")
    status, said, error = finish(process, 60)
    assert status == 2
    assert "a trial asks for 1 worker with 1 CPU and 2 GPUs, the cluster has a node of" in error
    assert not (tmp_path / "no").exists()


def test_a_node_that_dies_costs_its_trials_nothing_but_time(cluster: Any, tmp_path: Path) -> None:
    storage = tmp_path / "s"
    space = write_space(tmp_path, {"seed": [0, 1]}, fixed={"epochs": 12})
    process = on_cluster(cluster, space, storage)
    wait_for(lambda: len(checkpoints(storage, 2)) == 2, "both trials")
    cluster.remove_node(cluster.gpu_nodes.pop(), allow_graceful=False)
    status, _, error = finish(process)
    assert status == 0, error
    found = trials(storage)
    assert sorted(trial["attempts"] for trial in found) == [1, 2]
    (moved,) = [trial for trial in found if trial["attempts"] == 2]
    assert "resuming from" in log_of(storage, moved)
    train(make_config({**SHORT, "epochs": 12, "seed": moved["axes"]["seed"], "out": tmp_path / "undisturbed"}))
    assert_same_run(tmp_path / "undisturbed", storage / "trials" / moved["name"])


def test_a_trial_spans_nodes(cluster: Any, tmp_path: Path) -> None:
    space = write_space(tmp_path, {"seed": [0]}, fixed={"epochs": 1})
    process = on_cluster(cluster, space, tmp_path / "s", "--workers-per-trial", "2")
    status, said, error = finish(process)
    assert status == 0, error
    assert "each trial has 2 workers with 1 CPU and 1 GPU each" in said
    (trial,) = trials(tmp_path / "s")
    assert trial["summary"]["world_size"] == 2
