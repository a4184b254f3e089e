"""Signals at random moments, and ranks that stand still."""

import random
import signal
import time
from pathlib import Path

from .kills import undisturbed
from .runs import Child, Figures, difference, finish, fresh, lines_so_far, start_group, traceback_in


def at_random_moments(folder: Path, number: signal.Signals, moments: int, seed: int) -> Figures:
    """A signal to one process, anywhere between its start and its end: the run ends as if nothing had happened."""
    figures, dice = Figures(f"{number.name} at a random moment, one process"), random.Random(seed)
    # The signal may come after the end.
    expected = {0, -number} if number == signal.SIGKILL else {0, 128 + number}
    whole, seconds = undisturbed(folder)
    for _ in range(moments):
        out, moment = fresh(folder / "signalled"), dice.uniform(0.1, seconds)
        child = Child(out)
        child.wait_until(moment)
        since = time.monotonic()
        child.send(number)
        status = child.wait()
        figures.took("to stop", time.monotonic() - since)
        failure = traceback_in(child.said())
        if status not in expected:
            failure = failure or f"ended with {status}: {child.said()[-300:]}"
        resumed, took = finish(out)
        figures.took("to resume and end", took)
        failure = failure or resumed or difference(out, whole)
        figures.count(None if failure is None else f"{moment:.2f} s: {failure}")
    figures.note = f"seed {seed}; a run takes {seconds:.1f} s"
    return figures


def of_one_of_two(folder: Path, moments: int, seed: int) -> Figures:
    """SIGTERM to one of two processes within training: both save the same step and end with 143."""
    figures, dice = Figures("SIGTERM to one of two gloo processes"), random.Random(seed)
    whole, _ = undisturbed(folder, size=2)
    options = ["--checkpoint-every", "1s"]
    for _ in range(moments):
        out, told = fresh(folder / "stopped"), dice.randrange(2)
        children = start_group(out, options)
        while not lines_so_far(out) and not children[told].ended():
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.5))
        since = time.monotonic()
        children[told].send(signal.SIGTERM)
        statuses = [child.wait() for child in children]
        figures.took("to stop", time.monotonic() - since)
        # The signal may come after the last step.
        failure = None if statuses in ([143, 143], [0, 143], [143, 0], [0, 0]) else f"ended with {statuses}"
        figures.count(failure or finish(out, options, size=2)[0] or difference(out, whole))
    figures.note = f"seed {seed}; with a checkpoint every second, which the main process's clock decides"
    return figures


def of_one_rank(folder: Path, timeout: int, victims: tuple[int, ...]) -> Figures:
    """SIGSTOP to one of two ranks: the other ends within the time given, and names it."""
    figures = Figures("SIGSTOP of one of two gloo processes")
    whole, _ = undisturbed(folder, size=2)
    for victim in victims:
        out = fresh(folder / "standing")
        children = start_group(out, ["--timeout", str(timeout), "--epochs", "2"])
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
