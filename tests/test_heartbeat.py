"""Ranks that die or hang are named. (With real processes: `faults`.)"""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.distributed import HashStore

from distributed_batchcam.heartbeat import Heartbeat


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
