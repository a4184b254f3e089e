"""What tests of sweeps have in common: short trials, sweeps in this process and others, a look at how they stand."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from launching import ROOT, environment
from safetensors.torch import load_file

from distributed_batchcam.cli import run

# 16×16 digits: a second an epoch.
SHORT = {"dataset": "digits", "image_size": 16, "batch_size": 64, "epochs": 2, "device": "cpu"}


def write_space(folder: Path, grid: dict[str, Any], **parts: Any) -> str:
    """A YAML file of a space of short trials; `fixed` adds to `SHORT`."""
    file = folder / "space.yaml"
    fixed = {**SHORT, **parts.pop("fixed", {})}
    file.write_text(yaml.safe_dump({"fixed": fixed, "grid": grid, **parts}))
    return str(file)


def sweep(*arguments: str) -> int:
    """`batchcam sweep …` in this process, on CPUs where nothing else is said."""
    return run(["sweep", "--gpus-per-worker", "0", *arguments])


def start(*arguments: str, **extra: str) -> "subprocess.Popen[str]":
    """`batchcam sweep …` in a process of its own."""
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
    """Exit status, standard output and standard error."""
    out, error = process.communicate(timeout=seconds)
    return process.returncode, out, error


def standing(storage: Path) -> dict[str, Any]:
    """sweep.json."""
    return json.loads((storage / "sweep.json").read_text())


def trials(storage: Path) -> list[dict[str, Any]]:
    return standing(storage)["trials"]


def log_of(storage: Path, trial: dict[str, Any]) -> str:
    return (storage / f"logs/{trial['name']}.log").read_text()


def processes_of(log: str) -> list[int]:
    """Process ids of a trial's attempts."""
    return [int(number) for number in re.findall(r"^batchcam: trial \w+ on .+, process (\d+)$", log, re.MULTILINE)]


def checkpointed(storage: Path, epoch: int) -> list[Path]:
    """Run directories with a checkpoint of this epoch or of a later one: all but the newest two are removed."""
    newest: dict[Path, int] = {}
    for path in storage.glob("trials/*/checkpoints/epoch_*"):
        if found := re.fullmatch(r"epoch_(\d+)", path.name):
            run_dir = path.parents[1]
            newest[run_dir] = max(newest.get(run_dir, 0), int(found[1]))
    return [run_dir for run_dir, last in newest.items() if last >= epoch]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 180) -> Any:
    """Poll until something is there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except (OSError, ValueError, IndexError, KeyError):
            pass  # not written yet
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s for {what}")


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights and validation figures, bit for bit."""
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert validation(one) == validation(other)
    figures = [
        {name: value for name, value in json.loads((path / "summary.json").read_text()).items() if name not in _TIMES}
        for path in (one, other)
    ]
    assert figures[0] == figures[1]


def validation(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines if line["split"] == "valid"]


_TIMES = {"images_per_second", "train_seconds"}
