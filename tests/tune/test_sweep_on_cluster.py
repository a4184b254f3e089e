"""Sweeps on a simulated cluster: a head without GPUs and two nodes with one logical GPU each, all on this machine."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
        cluster.gpu_nodes = []
        yield cluster
        cluster.shutdown()


@pytest.fixture
def cluster(head: Any) -> Any:
    """With both nodes, also where a test before lost one."""
    while len(head.gpu_nodes) < 2:
        head.gpu_nodes.append(head.add_node(num_cpus=4, num_gpus=1))
    return head


def on_cluster(cluster: Any, space: str, storage: Path, *flags: str) -> "subprocess.Popen[str]":
    return start(
        *("--space", space, "--storage", str(storage), "--address", cluster.address, *flags), RAY_AUTH_MODE="disabled"
    )


def node_of(cluster: Any, process: int) -> Any:
    """The node that a worker's process runs on."""
    ancestors = {parent.pid for parent in psutil.Process(process).parents()}
    (node,) = [
        node
        for node in cluster.gpu_nodes
        if any(info.process.pid in ancestors for infos in node.all_processes.values() for info in infos)
    ]
    return node


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


@pytest.mark.parametrize(
    ("flags", "each", "at_a_time"),
    [(["--gpus-per-worker", "0.5"], "0.5 GPUs", 4), ([], "1 GPU", 2)],
    ids=["halves", "a GPU per worker where there are any"],
)
def test_trials_are_placed_by_gpu_and_shares_pack(
    flags: list[str], each: str, at_a_time: int, cluster: Any, tmp_path: Path
) -> None:
    space = write_space(tmp_path, {"seed": list(range(at_a_time + 1))}, fixed={"epochs": 3})
    process = on_cluster(cluster, space, tmp_path / "s", *flags)
    most = most_at_a_time(process, tmp_path / "s")
    status, said, error = finish(process)
    assert status == 0, error
    assert f"each trial has 1 worker with 1 CPU and {each}" in said
    assert most == at_a_time, "as many as two GPUs hold, never more"


def test_more_gpus_than_any_node_has_are_refused_with_a_line(cluster: Any, tmp_path: Path) -> None:
    space = write_space(tmp_path, {"seed": [0]})
    process = on_cluster(cluster, space, tmp_path / "no", "--gpus-per-worker", "2", "--wait", "3")
    status, _, error = finish(process)
    assert status == 2
    assert "a trial asks for 1 worker with 1 CPU and 2 GPUs, the cluster has a node of" in error
    assert not (tmp_path / "no").exists()


def test_a_trial_spans_nodes(cluster: Any, tmp_path: Path) -> None:
    space = write_space(tmp_path, {"seed": [0]}, fixed={"epochs": 1})
    process = on_cluster(cluster, space, tmp_path / "s", "--workers-per-trial", "2")
    status, said, error = finish(process)
    assert status == 0, error
    assert "each trial has 2 workers with 1 CPU and 1 GPU each" in said
    (trial,) = trials(tmp_path / "s")
    assert trial["summary"]["world_size"] == 2


def test_a_node_that_dies_costs_its_trials_nothing_but_time(cluster: Any, tmp_path: Path) -> None:
    storage = tmp_path / "s"
    space = write_space(tmp_path, {"seed": [0, 1]}, fixed={"epochs": 12})
    process = on_cluster(cluster, space, storage)
    begun = wait_for(lambda: checkpointed(storage, 2), "a trial to be under way")[0].name
    (worker,) = processes_of((storage / f"logs/{begun}.log").read_text())
    node = node_of(cluster, worker)
    cluster.gpu_nodes.remove(node)
    cluster.remove_node(node, allow_graceful=False)
    status, _, error = finish(process)
    assert status == 0, error
    found = {trial["name"]: trial for trial in trials(storage)}
    moved = found.pop(begun)
    assert (moved["state"], moved["attempts"]) == ("finished", 2)
    assert "resuming from" in log_of(storage, moved)
    (other,) = found.values()
    assert (other["state"], other["attempts"]) == ("finished", 1)
    train(make_config({**SHORT, "epochs": 12, "seed": moved["axes"]["seed"], "out": tmp_path / "undisturbed"}))
    assert_same_run(tmp_path / "undisturbed", storage / "trials" / moved["name"])
