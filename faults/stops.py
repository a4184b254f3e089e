"""SIGTERM at random moments, and ranks that stand still."""

import random
import signal
import time
from pathlib import Path

from .kills import undisturbed
from .runs import Child, Figures, difference, finish, fresh, start_pair, traceback_in


def at_random_moments(folder: Path, moments: int, seed: int) -> Figures:
    """SIGTERM to one process: status 143, and the run ends as if nothing had happened."""
    figures, dice = Figures("SIGTERM at a random moment"), random.Random(seed)
    whole, seconds = undisturbed(folder)
    for _ in range(moments):
        out, moment = fresh(folder / "stopped"), dice.uniform(0.1, seconds)
        child = Child(out)
        child.wait_until(moment)
        since = time.monotonic()
        child.send(signal.SIGTERM)
        status = child.wait()
        figures.took("to stop", time.monotonic() - since)
        failure = traceback_in(child.said())
        # The signal may come after the end.
        if status not in (143, 0):
            failure = failure or f"ended with {status}: {child.said()[-300:]}"
        figures.count(failure or finish(out)[0] or difference(out, whole))
    figures.note = f"seed {seed}"
    return figures


def of_one_rank(folder: Path, timeout: int) -> Figures:
    """SIGSTOP to each of two ranks in turn: the other ends within the time given, and names it."""
    figures = Figures("SIGSTOP of one of two gloo processes")
    whole, _ = undisturbed(folder, size=2)
    for victim in (0, 1):
        out = fresh(folder / "standing")
        children = start_pair(out, ["--timeout", str(timeout), "--epochs", "2"])
        while not list(out.glob("checkpoints/epoch_*")) and not children[victim].ended():
            time.sleep(0.01)
        children[victim].send(signal.SIGSTOP)
        since = time.monotonic()
        status = children[1 - victim].wait(timeout + 30)
        figures.took("to detect", time.monotonic() - since)
        children[victim].send(signal.SIGKILL)
        children[victim].wait()
        said = children[1 - victim].said()
        failure = None if status == 1 and f"rank {victim}" in said else f"rank {victim}: {status}, {said[-300:]}"
        figures.count(failure or finish(out, size=2)[0] or difference(out, whole))
    figures.note = f"--timeout {timeout}"
    return figures
