"""Short runs in forked processes, to be disturbed, and what to compare them with.

A process that has imported everything forks each run, which saves the seconds that importing takes. That is safe
here since this process never trains: it has no threads for a fork to lose (`Child` makes sure).
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from distributed_batchcam.cli import run

# What a run imports where it needs it; the rest comes with the trainer.
for module in ("trainer", "report.html", "report.figures"):
    import_module(f"distributed_batchcam.{module}")
for module in ("accelerate", "jinja2", "matplotlib.backends.backend_agg", "sklearn.datasets", "torch._dynamo"):
    import_module(module)
torch.set_num_threads(1)

OPTIONS = [
    *("train", "--dataset", "digits", "--image-size", "16", "--batch-size", "64", "--device", "cpu", "--epochs", "2"),
    *("--checkpoint-every", "7steps", "--log-every", "5", "--resume", "auto", "--timeout", "40"),
]
CLOCK = {"time", "images_per_second"}


@dataclass
class Figures:
    """What one kind of fault came to."""

    fault: str
    kind: Literal["fault", "restart", "cost", "soak"] = "fault"  # the part of the document
    tried: int = 0
    survived: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by what took them
    failures: list[str] = field(default_factory=list)
    note: str = ""
    processors: float | None = None  # that it got, on average

    def count(self, failure: str | None) -> None:
        """Count one trial; `failure` says what went wrong, if anything."""
        self.tried += 1
        if failure is None:
            self.survived += 1
        else:
            self.failures.append(failure)

    def took(self, what: str, seconds: float) -> None:
        self.seconds.setdefault(what, []).append(seconds)


class Child:
    """A run in a forked process; its output goes to a file.

    Args:
        out: the run directory.
        options: after `OPTIONS`.
        rank, size, port: of several processes.
        hook: called in the child before the run.
        log: the file for its output; default: beside the run directory.
    """

    def __init__(
        self,
        out: Path,
        options: list[str] | None = None,
        *,
        rank: int = 0,
        size: int = 1,
        port: int = 0,
        hook: Callable[[], object] | None = None,
        log: Path | None = None,
    ) -> None:
        self.log = log or out.with_name(f"{out.name}.{rank}.log")
        self.status: int | None = None
        sys.stdout.flush()
        assert not (lost := _other_threads()), f"a fork would lose the threads {lost}: set OMP_NUM_THREADS=1"
        self.since = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._run([*OPTIONS, "--out", str(out), *(options or [])], rank, size, port, hook)

    def _run(self, arguments: list[str], rank: int, size: int, port: int, hook: Callable[[], object] | None) -> None:
        """In the child."""
        status = 70
        try:
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if size > 1:
                several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
                os.environ |= {name: str(value) for name, value in (several | address).items()}
            if hook is not None:
                hook()
            status = run(arguments)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait(self, seconds: float = 120) -> int | None:
        """The exit status, negative for a signal; None if it hangs, which ends it."""
        deadline = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return None
            time.sleep(0.005)
        return self.status

    def wait_until(self, seconds: float) -> None:
        """Return that many seconds after its start, or when it has ended."""
        while not self.ended() and time.monotonic() - self.since < seconds:
            time.sleep(0.001)

    def send(self, number: signal.Signals) -> None:
        if not self.ended():
            os.kill(self.pid, number)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _other_threads() -> list[str]:
    """Names of this process's threads but the main one, and jemalloc's (pyarrow brings it), which knows of forks."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    names = [(task / "comm").read_text().strip() for task in tasks]
    return [name for name in names if name != "jemalloc_bg_thd"]


def start_group(out: Path, options: list[str] | None = None, size: int = 2) -> list[Child]:
    """A run on several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Child(out, options, rank=rank, size=size, port=port) for rank in range(size)]


def finish(out: Path, options: list[str] | None = None, *, size: int = 1) -> tuple[str | None, float]:
    """Let a run go on to its end: what went wrong, if anything, and the seconds it took."""
    since = time.monotonic()
    children = [Child(out, options)] if size == 1 else start_group(out, options, size)
    statuses = [child.wait() for child in children]
    if any(statuses):
        return f"resumed with status {statuses}: {children[0].said()[-500:]}", time.monotonic() - since
    return None, time.monotonic() - since


def difference(out: Path, undisturbed: Path) -> str | None:
    """What two finished runs differ in, but for the clock."""
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, undisturbed))
    for name in theirs:
        if not torch.equal(ours[name], theirs[name]):
            return f"{name} differs"
    if lines_of(out) != lines_of(undisturbed):
        return "metrics.jsonl differs"
    return None


def lines_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def lines_so_far(out: Path) -> int:
    file = out / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def traceback_in(said: str) -> str | None:
    return f"a traceback: {said[-500:]}" if "Traceback" in said else None


def fresh(out: Path) -> Path:
    """The path of a folder or file, with nothing there any more."""
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    return out
