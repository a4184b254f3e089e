"""Ranks that die or hang are named. (With real processes: `faults`.)"""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.distributed import HashStore

from distributed_batchcam.errors import RunFault
from distributed_batchcam.heartbeat import Heartbeat, lost_before_training
from distributed_batchcam.runtime import restarts_may_not_meet


@pytest.mark.parametrize(
    ("beats", "line"),
    [
        (["7 40", "9 38"], "rank 1 (pid 11) is alive, but hangs in step 39 while others are in step 41"),
        (["7 40", "9 40"], ""),
        (["7 40", "ended 40"], "rank 1 (pid 11) ended after step 40"),
        (["ended 40", "9 40"], ""),  # its own end is no news to it
    ],
)
def test_of_ranks_that_give_signs_of_life_the_one_that_is_behind_or_has_ended_is_named(
    beats: list[str], line: str
) -> None:
    heartbeat = Heartbeat(cast(Any, SimpleNamespace(process_index=0, num_processes=1)), timeout=1)
    heartbeat._size, heartbeat._store = 2, HashStore()
    for rank, beat in enumerate(beats):
        heartbeat._store.set(f"who/{rank}", f"rank {rank} (pid {10 + rank})")
        heartbeat._store.set(f"beat/{rank}", beat)
    assert heartbeat._straggler() == line


@pytest.mark.parametrize(("restarts", "here", "advised"), [("3", "2", True), ("3", "4", False), ("0", "2", False)])
def test_restarts_on_several_machines_that_share_a_store_are_warned_of(
    restarts: str, here: str, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": restarts,
        "LOCAL_WORLD_SIZE": here,
        "WORLD_SIZE": "4",
    }.items():
        monkeypatch.setenv(name, value)
    met = pytest.raises(RunFault, match="another process was lost while the processes met")
    with met as raised, lost_before_training():
        raise RuntimeError("Gloo connectFullMesh failed with timed out connecting")
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in str(raised.value)) == advised
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert not restarts_may_not_meet()
