"""sweep.json and the leaderboard, against statistics written out."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_batchcam.errors import InputError
from tune.record import SweepRecord, TrialRecord, leaderboard, leaderboard_csv, leaderboard_text
from tune.space import Space
from tune.storage import Storage

SPACE = Space(grid={"objective": ["baseline", "pl_l1"], "weight": [0.1], "seed": [0, 1, 2]})


def summary(valid: float, test: float, **further: Any) -> dict[str, Any]:
    return {"best_valid_accuracy": valid, "best_test_accuracy": test, "test_accuracy": test - 1, "epochs": 3, **further}


@pytest.fixture
def record() -> SweepRecord:
    record = SweepRecord("id", SPACE, {"searcher": "grid"})
    figures = {"baseline": [(90, 91), (92, 91.5), (94, 89)], "pl_l1": [(95, 88), (93, 90)]}
    for trial in SPACE.trials():
        entry = record.add(trial)
        runs = figures[str(trial.axes["objective"])]
        seed = int(trial.axes["seed"])
        if seed < len(runs):
            entry.state, entry.summary = "finished", summary(*runs[seed], cam_l1=0.1 * (seed + 1))
        else:
            entry.state, entry.reason = "failed", "it was to fail"
    return record


def test_seeds_are_averaged_and_the_best_validation_accuracy_leads(record: SweepRecord) -> None:
    first, second = leaderboard(record.trials.values())
    assert (first.axes, first.seeds) == ({"objective": "pl_l1", "weight": 0.1}, 2)
    assert (second.axes, second.seeds) == ({"objective": "baseline"}, 3)
    for standing, valid, test in ((first, [95, 93], [88, 90]), (second, [90, 92, 94], [91, 91.5, 89])):
        for name, values in (("best_valid_accuracy", valid), ("best_test_accuracy", test)):
            assert standing.figures[name].mean == pytest.approx(np.mean(values))
            assert standing.figures[name].deviation == pytest.approx(np.std(values, ddof=1))


def test_the_csv_file_has_a_line_for_each_combination(record: SweepRecord) -> None:
    rows = list(csv.DictReader(io.StringIO(leaderboard_csv(record))))
    assert [(row["place"], row["objective"], row["weight"], row["seeds"]) for row in rows] == [
        ("1", "pl_l1", "0.1", "2"),
        ("2", "baseline", "", "3"),
    ]
    assert float(rows[0]["best_test_accuracy_mean"]) == 89
    assert float(rows[1]["cam_l1_mean"]) == pytest.approx(0.2)
    assert rows[0]["relevance_mass_mean"] == "", "what no run has is left empty"


def test_a_single_seed_has_no_deviation() -> None:
    entry = TrialRecord("i", "n", {"seed": 0}, "finished", summary=summary(90, 91))
    (standing,) = leaderboard([entry])
    assert standing.figures["best_valid_accuracy"].deviation is None
    assert standing.figures["best_valid_accuracy"].text() == "90.00"


def test_the_table_shows_means_and_deviations(record: SweepRecord) -> None:
    lines = leaderboard_text(record).splitlines()
    assert lines[0].split() == [
        "objective",
        "weight",
        "seeds",
        "validation,",
        "%",
        "test,",
        "%",
        "class",
        "CAM",
        "SSIM",
    ]
    assert lines[1].split() == ["1", "pl_l1", "0.1", "2", "94.00", "±", "1.41", "89.00", "±", "1.41"]
    assert leaderboard_text(record, most=1).splitlines()[-1] == "… and 1 more in leaderboard.csv"


def test_a_sweep_is_read_back_as_it_was(record: SweepRecord, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    record.save(storage)
    assert SweepRecord.load(storage) == record
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert document["counts"] == {"finished": 5, "stopped": 0, "failed": 1, "running": 0, "waiting": 0}
    assert document["leaderboard"][0]["best_valid_accuracy_mean"] == 94
    assert SweepRecord.load(Storage(tmp_path / "other")) is None


@pytest.mark.parametrize("content", ["", "[]", '{"id": 1}', '{"id": "a", "plan": {}, "space": {"x": 1}, "trials": []}'])
def test_a_damaged_sweep_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(InputError):
        SweepRecord.load(Storage(tmp_path))


def test_a_trial_is_finished_once_its_summary_is_there(tmp_path: Path) -> None:
    storage, trial = Storage(tmp_path), TrialRecord("i", "name", {}, "failed", reason="before")
    record = SweepRecord("id", SPACE, {}, {"i": trial})
    record.take_summary(trial, storage)
    assert trial.state == "failed"
    storage.write("trials/name/summary.json", json.dumps(summary(90, 91)).encode())
    record.take_summary(trial, storage)
    assert (trial.state, trial.reason, trial.epoch) == ("finished", "", 3)
