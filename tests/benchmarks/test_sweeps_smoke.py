"""The benchmark of sweeps runs at a tiny size and writes what it says."""

import json
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="sweeps need Ray: pip install 'distributed-batchcam[tune]'")

from benchmarks import sweeps

pytestmark = pytest.mark.slow


def test_sweeps_are_compared_with_their_runs_and_asha_with_the_grid(tmp_path: Path) -> None:
    small = ["--trials", "1", "--epochs", "2", "--weights", "2", "--objectives", "pl_l1", "--rounds", "2"]
    sweeps.main([*small, "--json", str(tmp_path / "sweeps.json")])
    document = json.loads((tmp_path / "sweeps.json").read_text())
    assert document["overhead"]["trials"] == 1
    assert document["overhead"]["sweep_seconds"] > document["overhead"]["train_seconds"] > 0
    grid, _ = document["asha"]
    assert (grid["trials"], grid["epochs"]) == (2, 4)
    assert 2 <= grid["asha_epochs"] <= 4
    assert grid["asha_best"] <= grid["best"]
    assert [bar["passed"] for bar in document["bars"]] == ["not measured"] * 3
    assert "ray" in document["versions"]
