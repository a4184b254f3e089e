"""The environment of each process of a trial is what torchrun would set."""

import threading
from typing import Any

import pytest

pytest.importorskip("ray", reason="sweeps need Ray: pip install 'distributed-batchcam[tune]'")

from tune.ranks import Place, torchrun_environments


def names(environments: list[dict[str, str]], *keys: str) -> list[tuple[str, ...]]:
    return [tuple(environment.get(key, "") for key in keys) for environment in environments]


def test_ranks_of_a_node_follow_one_another_and_share_its_gpus() -> None:
    places = [Place("b", "10.0.0.2", ("3",)), Place("a", "10.0.0.1", ("0",)), Place("b", "10.0.0.2", ("1",))]
    environments = torchrun_environments(places, 1234)
    assert names(environments, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES") == [
        ("0", "0", "2", "3,1"),
        ("2", "0", "1", "0"),
        ("1", "1", "2", "3,1"),
    ]
    assert set(names(environments, "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")) == {("3", "10.0.0.2", "1234")}


def test_without_gpus_none_are_named() -> None:
    places = [Place("a", "10.0.0.1", ()), Place("a", "10.0.0.1", ())]
    assert all("CUDA_VISIBLE_DEVICES" not in environment for environment in torchrun_environments(places, 1))


def test_a_rank_that_fails_takes_a_waiting_trial_along(two_cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from tune import ranks

    ended = threading.Event()
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(ranks.os, "_exit", lambda status: ended.set())

    @ray.remote
    def fail() -> None:
        raise OSError("gone")

    @ray.remote
    def succeed() -> None: ...

    running: dict[Any, str] = {succeed.remote(): "rank 1", fail.remote(): "rank 2"}
    with ranks._watched(running):
        assert ended.wait(60)


def test_ranks_that_end_well_leave_the_trial_alone(two_cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from tune import ranks

    monkeypatch.setattr(ranks.os, "_exit", lambda status: pytest.fail("ended a healthy trial"))

    @ray.remote
    def succeed() -> int:
        return 1

    running: dict[Any, str] = {succeed.remote(): "rank 1"}
    with ranks._watched(running):
        assert ray.get(list(running)) == [1]
