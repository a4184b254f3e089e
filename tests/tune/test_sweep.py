"""Sweeps on a Ray in this process: what they leave, and what they survive."""

import argparse
import json
import os
import re
import shlex
import signal
import threading
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="sweeps need Ray: pip install 'distributed-batchcam[tune]'")

from launching import ROOT, gloo, launch
from sweeping import (
    SHORT,
    assert_same_run,
    checkpointed,
    log_of,
    processes_of,
    standing,
    sweep,
    trials,
    validation,
    wait_for,
    write_space,
)

from distributed_batchcam.cli import run
from distributed_batchcam.config import RunConfig, make_config
from distributed_batchcam.trainer import train
from tune.space import read_space
from tune.sweep import _PATHS, add_arguments, parse_assignments

pytestmark = pytest.mark.usefixtures("two_cpus")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory, two_cpus: None) -> Path:
    """The smoke space, on smaller images."""
    storage = tmp_path_factory.mktemp("sweeps") / "smoke"
    assert sweep("--space", "smoke", "--set", "image_size=16", "device=cpu", "--storage", str(storage)) == 0
    return storage


def test_its_trials_are_the_runs_that_train_makes_bit_for_bit(smoke: Path, tmp_path: Path) -> None:
    found = {trial["id"]: trial for trial in trials(smoke)}
    planned = read_space("smoke").with_fixed({"image_size": 16, "device": "cpu"}).trials()
    assert {trial.id for trial in planned} == found.keys()
    for trial in planned:
        train(make_config({**trial.options, "out": tmp_path / trial.id}))
        assert_same_run(tmp_path / trial.id, smoke / "trials" / trial.name)
        assert found[trial.id]["state"] == "finished"
        assert found[trial.id]["attempts"] == 1


def test_it_leaves_a_leaderboard_over_seeds(smoke: Path) -> None:
    lines = (smoke / "leaderboard.csv").read_text().splitlines()
    assert lines[0].startswith("place,objective,seeds,best_valid_accuracy_mean,best_valid_accuracy_sd,")
    assert len(lines) == 4
    board = standing(smoke)["leaderboard"]
    assert [entry["seeds"] for entry in board] == [2, 2, 2]
    means = [entry["best_valid_accuracy_mean"] for entry in board]
    assert means == sorted(means, reverse=True)


def test_nodes_of_other_clusters_may_start_afterwards(smoke: Path) -> None:
    # What keeps a Ray of our own on the loopback interface would keep `ray start --address` from joining any cluster.
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ


def test_what_reads_runs_reads_trials(smoke: Path, tmp_path: Path) -> None:
    assert run(["report", str(smoke), "-o", str(tmp_path / "all.html")]) == 0
    page = (tmp_path / "all.html").read_text()
    assert all(trial["id"] in page for trial in trials(smoke))


def test_a_finished_sweep_that_is_resumed_runs_nothing(smoke: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (smoke / "trials").rglob("*")}
    assert sweep("--storage", str(smoke), "--resume") == 0
    assert {path: path.stat().st_mtime_ns for path in (smoke / "trials").rglob("*")} == before
    assert "6 trials, 6 of them finished before" in capsys.readouterr().out


def test_two_workers_give_the_result_of_one(tmp_path: Path) -> None:
    space = write_space(tmp_path, {"objective": ["bcpl_l1"]}, fixed={"log_every": 1})
    for workers in (1, 2):
        assert (
            sweep("--space", space, "--workers-per-trial", str(workers), "--storage", str(tmp_path / str(workers))) == 0
        )
    (one,), (two,) = trials(tmp_path / "1"), trials(tmp_path / "2")
    assert (one["summary"]["world_size"], two["summary"]["world_size"]) == (1, 2)
    assert "2 processes on cpu (gloo)" in log_of(tmp_path / "2", two)
    for a, b in zip(
        validation(tmp_path / "1/trials" / one["name"]), validation(tmp_path / "2/trials" / two["name"]), strict=True
    ):
        # float32 sums in another order: as for runs under a launcher.
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)
        assert b["cam_l1"] == pytest.approx(a["cam_l1"], rel=2e-2)


def test_a_trial_that_cannot_be_fails_with_its_reason_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = write_space(tmp_path, {"target_layer": ["conv2", "conv3"]}, fixed={"epochs": 1})
    assert sweep("--space", space, "--storage", str(tmp_path / "s")) == 1
    states = {trial["axes"]["target_layer"]: trial for trial in trials(tmp_path / "s")}
    assert states["conv2"]["state"] == "finished"
    assert states["conv3"]["state"] == "failed"
    assert states["conv3"]["attempts"] == 1, "bad input is not tried again"
    assert "unknown target layer of simple_cnn 'conv3'; did you mean conv2" in states["conv3"]["reason"]
    said = capsys.readouterr().out
    assert "1 finished, 1 failed" in said
    assert f"{states['conv3']['name']} failed: unknown target layer" in said
    assert sweep("--storage", str(tmp_path / "s"), "--resume") == 1
    states = {trial["axes"]["target_layer"]: trial for trial in trials(tmp_path / "s")}
    assert (states["conv2"]["attempts"], states["conv3"]["attempts"]) == (1, 2), "resuming tries failed trials again"


def test_more_than_the_cluster_has_is_refused_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = write_space(tmp_path, {"seed": [0]})
    flags = ["--space", space, "--storage", str(tmp_path / "s")]
    for more, asked in (
        (["--workers-per-trial", "3"], "3 workers with 1 CPU each"),
        (["--gpus-per-worker", "1"], "1 worker with 1 CPU and 1 GPU"),
        (["--cpus-per-worker", "2.5", "--gpus-per-worker", "0"], "1 worker with 2.5 CPUs"),
    ):
        assert sweep(*flags, "--wait", "1", *more) == 2
        said = capsys.readouterr().err
        assert f"a trial asks for {asked}, the cluster has a node of 2 CPUs and 0 GPUs: lower" in said
    assert not (tmp_path / "s").exists()


def test_workers_of_a_trial_do_not_share_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--space", write_space(tmp_path, {"seed": [0]}), "--storage", str(tmp_path / "s")]
    assert sweep(*flags, "--workers-per-trial", "2", "--gpus-per-worker", "0.5") == 2
    assert "workers of one trial cannot share a GPU" in capsys.readouterr().err


def test_asha_stops_weak_trials_and_a_resumed_sweep_leaves_them(tmp_path: Path) -> None:
    # All learning rates but one learn nothing; one trial at a time makes the order certain.
    space = write_space(tmp_path, {"lr": [0.003, 1e-7, 2e-7, 3e-7]}, fixed={"epochs": 4})
    flags = ["--storage", str(tmp_path / "s"), "--max-concurrent", "1"]
    assert sweep("--space", space, "--scheduler", "asha", *flags) == 0
    states = {trial["axes"]["lr"]: trial for trial in trials(tmp_path / "s")}
    again = states[0.003]
    assert again["state"] == "finished"
    stopped = [trial for trial in states.values() if trial["state"] == "stopped"]
    assert stopped
    assert all(trial["epoch"] < 4 and not trial["summary"] for trial in stopped)
    assert all("summary.json" not in os.listdir(tmp_path / "s/trials" / trial["name"]) for trial in stopped)
    # The good trial, to be done again, is compared with what the others once reported.
    (tmp_path / "s/trials" / again["name"] / "summary.json").unlink()
    document = standing(tmp_path / "s")
    next(trial for trial in document["trials"] if trial["id"] == again["id"])["state"] = "waiting"
    (tmp_path / "s/sweep.json").write_text(json.dumps(document))
    logs = {trial["id"]: log_of(tmp_path / "s", trial) for trial in stopped}
    assert sweep("--resume", *flags) == 0
    now = {trial["id"]: trial for trial in trials(tmp_path / "s")}
    assert now[again["id"]]["state"] == "finished"
    for trial in stopped:
        assert (now[trial["id"]]["state"], now[trial["id"]]["epoch"]) == ("stopped", trial["epoch"])
        added = log_of(tmp_path / "s", trial).removeprefix(logs[trial["id"]])
        assert "epoch" not in added, "it reports, and trains no more"


def test_optuna_chooses_within_the_space_and_takes_up_what_was_begun(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="this searcher needs Optuna: pip install 'distributed-batchcam[tune]'")
    space = write_space(
        tmp_path,
        {"objective": ["pl_l1", "bcpl_l1"]},
        fixed={"epochs": 1},
        sample={"weight": {"loguniform": [0.01, 1]}, "label_smoothing": {"uniform": [0, 0.1]}},
    )
    flags = ["--storage", str(tmp_path / "s")]
    assert sweep("--space", space, "--searcher", "optuna", "--samples", "3", *flags) == 0
    found = trials(tmp_path / "s")
    assert len(found) == 3
    for trial in found:
        assert trial["state"] == "finished"
        assert trial["axes"]["objective"] in ("pl_l1", "bcpl_l1")
        assert 0.01 <= trial["axes"]["weight"] <= 1
        assert 0 <= trial["axes"]["label_smoothing"] <= 0.1
    (tmp_path / "s/trials" / found[1]["name"] / "summary.json").unlink()
    text = (tmp_path / "s/sweep.json").read_text()
    document = json.loads(text)
    document["trials"][1]["state"] = "waiting"
    (tmp_path / "s/sweep.json").write_text(json.dumps(document))
    assert sweep("--resume", *flags) == 0
    assert [(trial["id"], trial["attempts"]) for trial in trials(tmp_path / "s")] == [
        (found[0]["id"], 1),
        (found[1]["id"], 2),
        (found[2]["id"], 1),
    ]


def test_a_killed_worker_costs_nothing_but_time(tmp_path: Path) -> None:
    space = write_space(tmp_path, {"seed": [0]}, fixed={"epochs": 8})
    storage = tmp_path / "s"

    def kill() -> None:
        (run_dir,) = wait_for(lambda: checkpointed(storage, 2), "a checkpoint")
        os.kill(processes_of((storage / f"logs/{run_dir.name}.log").read_text())[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert sweep("--space", space, "--storage", str(storage)) == 0
    killer.join()
    (trial,) = trials(storage)
    assert (trial["state"], trial["attempts"]) == ("finished", 2)
    assert "resuming from" in log_of(storage, trial)
    train(make_config({**SHORT, "epochs": 8, "seed": 0, "out": tmp_path / "undisturbed"}))
    assert_same_run(tmp_path / "undisturbed", storage / "trials" / trial["name"])


def test_a_killed_rank_of_two_costs_nothing_but_time(tmp_path: Path) -> None:
    import psutil

    space = write_space(tmp_path, {"seed": [0]}, fixed={"epochs": 8, "objective": "bcpl_l1"})
    storage = tmp_path / "s"

    def kill() -> None:
        (run_dir,) = wait_for(lambda: checkpointed(storage, 2), "a checkpoint")
        (trial,) = processes_of((storage / f"logs/{run_dir.name}.log").read_text())
        workers = psutil.Process(trial).parent().children()
        (rank,) = [worker for worker in workers if "_Rank.train" in " ".join(worker.cmdline())]
        rank.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    assert sweep("--space", space, "--workers-per-trial", "2", "--storage", str(storage)) == 0
    killer.join()
    (trial,) = trials(storage)
    assert (trial["state"], trial["attempts"]) == ("finished", 2)
    log = log_of(storage, trial)
    assert "resuming from" in log
    options = {**SHORT, "epochs": 8, "seed": 0, "objective": "bcpl_l1"}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    result = launch("train", *flags, "--out", str(tmp_path / "undisturbed"), flags=gloo(2))
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "undisturbed", storage / "trials" / trial["name"])


def test_a_uri_holds_what_a_folder_would(tmp_path: Path) -> None:
    space = write_space(tmp_path, {"seed": [0]})
    assert sweep("--space", space, "--storage", f"file://{tmp_path}/remote") == 0
    (trial,) = trials(tmp_path / "remote")
    assert "epoch 2/2" in log_of(tmp_path / "remote", trial)
    train(make_config({**SHORT, "seed": 0, "out": tmp_path / "plain"}))
    assert_same_run(tmp_path / "plain", tmp_path / "remote/trials" / trial["name"])
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        path.name for path in (tmp_path / "remote/trials" / trial["name"]).iterdir()
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--space", "smoke"], "holds a sweep: go on with it by --resume, or name another place"),
        (["--resume", "--space", "lambda"], "is of another space"),
        (["--resume", "--scheduler", "asha"], "--scheduler was none when the sweep in"),
        (["--resume", "--set", "epochs=9"], "is of another space"),
    ],
)
def test_an_existing_sweep_is_not_mixed_with_another(
    flags: list[str], message: str, smoke: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (smoke / "sweep.json").read_bytes()
    assert sweep(*flags, "--storage", str(smoke)) == 2
    assert message in capsys.readouterr().err
    assert (smoke / "sweep.json").read_bytes() == before


BAD: list[tuple[list[str], str]] = [
    ([], "name what to try with --space"),
    (["--resume"], "--resume needs --storage"),
    (["--space", "smoke", "--set", "lr"], "--set takes OPTION=VALUE, got 'lr'"),
    (["--space", "smoke", "--set", "lrr=1"], "--set: unknown option 'lrr'; did you mean lr"),
    (["--space", "smoke", "--set", "lr=-1"], "--lr -1: input should be greater than 0"),
    (["--space", "smoke", "--searcher", "random"], "needs a space with axes to draw from"),
    (["--space", "smoke", "--searcher", "optuna"], "would search for a lucky seed"),
    (["--space", "smoke", "--samples", "2"], "--samples is for random and optuna"),
    (["--space", "smoke", "--samples", "0"], "must be at least 1"),
    (
        ["--space", "smoke", "--workers-per-trail", "2"],
        "unknown option '--workers-per-trail'; did you mean --workers-per-trial",
    ),
    (["--space", "smoke", "--storage", "nowhere://x"], "--storage nowhere://x cannot be used"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line_with_status_2_and_leaves_nothing(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep(*flags) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("batchcam: error: ")
    assert message in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_every_option_that_is_a_path_may_be_relative() -> None:
    """A space's paths are made absolute: Ray's processes have working folders of their own."""
    paths = {name for name, field in RunConfig.model_fields.items() if "Path" in str(field.annotation)}
    assert set(_PATHS) == paths - {"out"}


def test_a_folder_of_other_things_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert sweep("--space", "smoke", "--storage", str(tmp_path)) == 2
    assert "is not empty and holds no sweep" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def documented_sweeps() -> list[str]:
    """The arguments of every sweep in README, cluster/README.md and the Kubernetes manifest."""
    texts = [(ROOT / name).read_text() for name in ("README.md", "cluster/README.md", "cluster/kubernetes/sweep.yaml")]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    sweep_line = re.compile(r"(?:entrypoint: |ray submit .*)?(?:batchcam sweep|tune/sweep\.py --) (--.*?)(?: +#.*)?")
    found = [sweep_line.fullmatch(line.strip()) for line in lines]
    return [match[1] for match in found if match]


def test_every_documented_sweep_is_understood() -> None:
    assert len(documented_sweeps()) > 5
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    for line in documented_sweeps():
        options, rest = parser.parse_known_args(shlex.split(line))
        assert rest == [], line
        if options.space and not options.space.endswith(".yaml"):
            read_space(options.space).with_fixed(parse_assignments(options.set))


def test_a_dry_run_prints_the_trials_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep("--space", "smoke", "--dry-run") == 0
    said = capsys.readouterr().out
    assert said.count("3 epochs") == 6
    assert "GPU-hours" in said
    assert list(tmp_path.iterdir()) == []
