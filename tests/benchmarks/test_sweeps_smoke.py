"""The benchmark of sweeps runs at a tiny size and writes what it says."""

import json
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="sweeps need Ray: pip install 'distributed-batchcam[tune]'")

from benchmarks import sweeps

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("two_cpus")
def test_sweeps_are_compared_with_their_runs_and_asha_with_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    # All sweeps join one Ray: to start its own is most of the time of a small one.
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    small = ["--trials", "1", "--epochs", "2", "--weights", "2", "--objectives", "pl_l1", "--rounds", "1"]
    small += ["--fresh-seeds", "2"]
    sweeps.main([*small, "--json", str(tmp_path / "sweeps.json")])
    document = json.loads((tmp_path / "sweeps.json").read_text())
    assert document["overhead"]["trials"] == 1
    assert document["overhead"]["sweep_seconds"] > document["overhead"]["train_seconds"] > 0
    (grid,) = document["asha"]
    assert (grid["trials"], grid["epochs"]) == (2, 4)
    assert 2 <= grid["asha_epochs"] <= 4
    assert len(grid["test_accuracies"]) == len(grid["asha_test_accuracies"]) == 2
    assert grid["winner"] != grid["asha_winner"] or grid["test_accuracies"] == grid["asha_test_accuracies"]
    assert [bar["passed"] for bar in document["bars"]] == ["not measured"] * 3
    assert "ray" in document["versions"]


def test_means_are_compared_pair_by_pair() -> None:
    # Differences 1, 2, 3: their mean is 2, their standard deviation 1, the standard error of the mean 1 / √3.
    assert sweeps.standard_errors([4.0, 4.0, 4.0], [3.0, 2.0, 1.0]) == pytest.approx(2 * 3**0.5)
    assert sweeps.standard_errors([4.0, 5.0], [4.0, 5.0]) == 0
