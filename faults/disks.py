"""A file system that runs full or becomes read-only, wherever in a run that is."""

import os
import subprocess
import time
from pathlib import Path

from .kills import undisturbed
from .runs import Child, Figures, difference, finish, fresh, traceback_in

ROOM_MB = 64


def may_mount() -> bool:
    """Whether this process may mount a small file system."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def small_file_systems(folder: Path, sizes: int) -> Figures:
    """A tmpfs too small for the run, by other amounts; then it is enlarged and the run resumed."""
    figures = Figures("the file system runs full, and is enlarged later")
    if not may_mount():
        figures.note = "not tried: mounting a tmpfs is for root"
        return figures
    whole, _ = undisturbed(folder)
    needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) >> 10
    place = folder / "small"
    place.mkdir()
    went_on = 0
    for number in range(sizes):
        kilobytes = max(16, needed * (number + 1) // (sizes + 1))
        if not _mount(place, f"size={kilobytes}k"):
            figures.note = "not tried: mounting a tmpfs is not allowed here"
            return figures
        try:
            child = Child(fresh(place / "run"), ["--timeout", "4"], log=folder / "small.log")
            status = child.wait()
            said = child.said()
            failure = traceback_in(said)
            if status not in (0, 1, 2):
                failure = failure or f"ended with {status}"
            if status and "No space left on device" not in said:
                failure = failure or f"does not say why it ended: {said[-300:]}"
            went_on += "training goes on" in said
            _mount(place, f"remount,size={ROOM_MB}m")
            since = time.monotonic()
            failure = failure or finish(place / "run")[0]
            figures.took("to resume and end", time.monotonic() - since)
            failure = failure or difference(place / "run", whole)
            figures.count(None if failure is None else f"{kilobytes} KiB: {failure}")
        finally:
            _unmount(place)
    figures.note = (
        f"of {needed} KiB needed, from {max(16, needed // (sizes + 1))} KiB on; {went_on} trained on meanwhile"
    )
    return figures


def read_only(folder: Path, moments: int) -> Figures:
    """The run's folder becomes read-only, at moments spread over the run; later it is writable and the run resumed."""
    figures = Figures("the folder becomes read-only, and writable later")
    place, out = folder / "sealed", folder / "sealed/run"
    place.mkdir()
    if not (may_mount() and _seal(place) and _unmount(place)):
        figures.note = "not tried: mounting a folder read-only is not allowed here"
        return figures
    whole, seconds = undisturbed(folder)
    refused = went_on = 0
    for number in range(moments):
        moment = seconds * number / moments
        child = Child(fresh(out), ["--timeout", "4"], log=folder / "sealed.log")
        child.wait_until(moment)
        _seal(place)
        try:
            status, said = child.wait(), child.said()
        finally:
            _unmount(place)
        failure = traceback_in(said)
        if status not in (0, 1, 2):
            failure = failure or f"ended with {status}"
        if status and not any(words in said for words in ("Read-only file system", "not a writable folder")):
            failure = failure or f"does not say why it ended: {said[-300:]}"
        refused += status == 2
        went_on += "training goes on" in said
        since = time.monotonic()
        failure = failure or finish(out)[0]
        figures.took("to resume and end", time.monotonic() - since)
        failure = failure or difference(out, whole)
        figures.count(None if failure is None else f"after {moment:.2f} s: {failure}")
    figures.note = f"{refused} refused before training began, one line and status 2; {went_on} trained on meanwhile"
    return figures


def _mount(place: Path, options: str) -> bool:
    return _succeeds("mount", "-t", "tmpfs", "-o", options, "tmpfs", place)


def _seal(place: Path) -> bool:
    """Cover a folder with itself, read-only: a mount with files open for writing cannot be made so."""
    return _succeeds("mount", "--bind", place, place) and _succeeds("mount", "-o", "remount,bind,ro", place)


def _unmount(place: Path) -> bool:
    return _succeeds("umount", place)


def _succeeds(*command: str | Path) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0
