"""Processes that die: one of two at random moments, and any at every moment inside a write."""

import os
import random
import signal
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from .runs import Child, Figures, difference, finish, fresh, lines_of, lines_so_far, start_group, traceback_in

CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
"""Of `os`: all that changes which files there are, and what makes them last."""
LOSS_TOLERANCE = 0.02
"""Relative: sums of float32 in another order, after as many steps as a run has."""


_seconds: dict[Path, float] = {}


def undisturbed(folder: Path, size: int = 1, options: tuple[str, ...] = ()) -> tuple[Path, float]:
    """A finished run to compare with, and the seconds it takes."""
    out = folder / "-".join(["undisturbed", str(size), *options])
    if out not in _seconds:
        finish(fresh(out), [*options], size=size)  # the first one is slower
        failure, _seconds[out] = finish(fresh(out), [*options], size=size)
        assert failure is None, failure
    return out, _seconds[out]


def one_of_two(folder: Path, victim: int, moments: int, seed: int) -> Figures:
    """Two gloo processes, one of them killed; the other must end by itself and say who is gone."""
    which = "the other" if victim else "the main one"
    figures, dice = Figures(f"kill -9 of one of two gloo processes, {which}"), random.Random(seed)
    whole, seconds = undisturbed(folder, size=2)
    named = 0
    for _ in range(moments):
        out, moment = fresh(folder / "killed"), dice.uniform(0, seconds)
        children = start_group(out)
        children[victim].wait_until(moment)
        children[victim].send(signal.SIGKILL)
        since = time.monotonic()
        other = children[1 - victim]
        status, said = other.wait(120), other.said()
        if children[victim].wait() == -signal.SIGKILL and status != 0:
            figures.took("to detect", time.monotonic() - since)
            named += f"rank {victim}" in said
            if f"rank {victim}" not in said:
                print(f"not named after {moment:.2f} s: {said.strip()}", file=sys.stderr)
        failure = "the other process hangs" if status is None else traceback_in(said)
        if failure is None:
            failure, took = finish(out, size=2)
            figures.took("to resume and end", took)
        figures.count(_at(f"{moment:.2f} s, rank {victim}", failure or difference(out, whole)))
    hits = len(figures.seconds.get("to detect", []))
    figures.note = (
        f"seed {seed}; a run takes {seconds:.1f} s; the rank was named {named} of {hits} times that it was lost "
        "before the end"
    )
    return figures


def other_sizes(folder: Path, times: int, seed: int) -> Figures:
    """Both of two processes killed within training; one, or three, go on along the same loss curve."""
    figures, dice = Figures("two processes killed, resumed on one and on three"), random.Random(seed)
    whole, _ = undisturbed(folder, size=2)
    furthest = 0.0
    for size in (1, 3) * times:
        out = fresh(folder / "resized")
        children = start_group(out)
        while not lines_so_far(out) and not children[0].ended():
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.5))
        for child in children:
            child.send(signal.SIGKILL)
        for child in children:
            child.wait()
        failure, _ = finish(out, size=size)
        if failure is None:
            apart = [
                abs(ours["loss"] / theirs["loss"] - 1)
                for ours, theirs in zip(lines_of(out), lines_of(whole), strict=True)
            ]
            furthest = max(furthest, *apart)
            failure = f"on {size}: the loss differs by {max(apart):.1e}" if max(apart) > LOSS_TOLERANCE else None
        figures.count(failure)
    figures.note = f"seed {seed}; the losses logged afterwards differ by {100 * furthest:.3f} % at most"
    return figures


def inside_writes(folder: Path, most: int | None = None) -> Figures:
    """Killed just before each call that changes files; of a file about to be synced, half is thrown away."""
    figures = Figures("kill -9 at each call inside a write, the file half written")
    whole, _ = undisturbed(folder)
    for number in _spread(count_calls(folder), most):
        out = fresh(folder / "torn")
        status = Child(out, hook=partial(_count_to, number, _tear_and_die)).wait()
        failure = None if status == -signal.SIGKILL else f"was not killed: {status}"
        if failure is None:
            failure, took = finish(out)
            figures.took("to resume and end", took)
        figures.count(_at(f"call {number}", failure or difference(out, whole)))
    return figures


def full_disk(folder: Path, most: int | None = None) -> Figures:
    """Each call that changes files fails once with "no space left"; the run goes on, or ends in one line."""
    figures = Figures("no space left at each call of a write, once")
    whole, _ = undisturbed(folder)
    refused = 0
    for number in _spread(count_calls(folder), most):
        out = fresh(folder / "full")
        child = Child(out, hook=partial(_count_to, number, _no_space))
        status, said = child.wait(), child.said()
        failure = traceback_in(said)
        if status == 2 and "No space left on device" in said:  # at the start: nothing was lost
            refused += 1
            failure, _ = finish(out)
        elif status != 0:
            failure = failure or f"ended with {status}: {said[-500:]}"
        figures.count(_at(f"call {number}", failure or difference(out, whole)))
    figures.note = f"{refused} of them before training began, which is one line and status 2"
    return figures


def _spread(count: int, most: int | None) -> list[int]:
    """1 … count, or so many of them, evenly."""
    most = count if most is None else min(most, count)
    return [count * (2 * number + 1) // (2 * most) + 1 for number in range(most)]


def count_calls(folder: Path) -> int:
    """Calls of `CALLS` in an undisturbed run."""
    out, note = fresh(folder / "counted"), folder / "calls"

    def hook() -> None:
        count = _count_to(0, _tear_and_die)
        finish_of = os._exit

        def leave(status: int) -> None:
            note.write_text(str(count()))
            finish_of(status)

        os._exit = leave  # type: ignore[assignment]

    assert Child(out, hook=hook).wait() == 0
    return int(note.read_text())


def _count_to(number: int, act: Callable[[Any], None]) -> Callable[[], int]:
    """In a child: do `act` before the call of that number; returns what tells how many there have been."""
    calls = [0]

    def counted(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            act(arguments[0])
        return original(*arguments, **options)

    for name in CALLS:
        setattr(os, name, partial(counted, getattr(os, name)))
    return lambda: calls[0]


def _tear_and_die(target: Any) -> None:
    if isinstance(target, int):
        with suppress(OSError):
            found = os.fstat(target)
            if stat.S_ISREG(found.st_mode):
                os.ftruncate(target, found.st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def _no_space(target: Any) -> None:
    raise OSError(28, "No space left on device")


def _at(where: str, failure: str | None) -> str | None:
    return None if failure is None else f"{where}: {failure}"
