"""How processes meet. (With real launchers that start them again: `faults`.)"""

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from distributed_batchcam import runtime


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The store of an elastic launcher of two processes on one machine."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    return store


def group_of(restart: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the process group of this restart is made with, nothing where that is left to Accelerate."""
    made: dict[str, Any] = {}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **kwargs: made.update(kwargs))
    runtime._meet(cpu=True, timeout=timedelta(seconds=5))
    return made


def test_restarts_do_not_read_what_those_before_them_left(launcher: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = group_of(0, monkeypatch)
    first["store"].set("address of rank 0", "old")
    assert (first["rank"], first["world_size"]) == (1, 2)
    again = group_of(0, monkeypatch)["store"]
    assert again.get("address of rank 0") == b"old", "the processes of one start do share it"
    restarted = group_of(1, monkeypatch)["store"]
    assert not restarted.check(["address of rank 0"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("TORCHELASTIC_MAX_RESTARTS", "0"), ("TORCHELASTIC_USE_AGENT_STORE", "False"), ("LOCAL_WORLD_SIZE", "1")],
)
def test_other_launches_are_left_to_accelerate(
    name: str, value: str, launcher: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert group_of(0, monkeypatch) == {}


def test_processes_that_have_met_do_not_meet_again(launcher: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert group_of(0, monkeypatch) == {}
