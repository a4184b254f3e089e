"""Trouble with W&B: the training does not notice."""

import os
import random
import signal
from functools import partial
from pathlib import Path

import psutil

from .kills import undisturbed
from .runs import Child, Figures, difference, fresh, traceback_in

SITUATIONS = {
    "W&B cannot be reached": {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "0" * 40,
    },
    "the folder of W&B cannot be written": {"WANDB_MODE": "offline", "WANDB_DIR": "/dev/null/wandb"},
    "the processes of W&B killed at a random moment": {"WANDB_MODE": "offline"},
}


def of_wandb(folder: Path, times: int, seed: int) -> list[Figures]:
    """Runs with --tracker wandb, each compared with one that has no tracker."""
    whole, seconds = undisturbed(folder)
    dice = random.Random(seed)
    found = []
    for situation, variables in SITUATIONS.items():
        figures = Figures(situation)
        for _ in range(times):
            out = fresh(folder / "tracked")
            child = Child(out, ["--tracker", "wandb"], hook=partial(os.environ.update, variables))
            if "killed" in situation:
                child.wait_until(dice.uniform(0.2, seconds))
                _kill_children(child)
            status = child.wait(240)
            failure = traceback_in(child.said()) or (f"ended with {status}: {child.said()[-300:]}" if status else None)
            figures.count(failure or difference(out, whole))
        found.append(figures)
    return found


def _kill_children(child: Child) -> None:
    if not child.ended():
        for process in psutil.Process(child.pid).children(recursive=True):
            process.send_signal(signal.SIGKILL)
