"""Ranks that die or hang: the others are told which one, and end."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch

from .errors import RunFault
from .runtime import SHARED_STORE, decided_by_main, restarts_may_not_meet
from .signals import DeferredSignals, Stopped

if TYPE_CHECKING:
    from accelerate import Accelerator

BEAT_SECONDS = 0.5
SILENT_SECONDS = 3.0
"""Silence that is a death where a collective has failed already."""
GRACE_SECONDS = 5.0
"""For the main thread to find out by itself, and to close its files, before its process is ended."""


class Heartbeat:
    """Each rank gives a sign of life; when one stays silent, or fails, all others end with a line that names it.

    A thread writes a count and the step that the rank is in to a store that the main process serves, and reads the
    verdict there. The main process compares counts: a rank that has been silent for the configured time is lost,
    whether it died, was stopped or lost its network. The main process itself is lost when its store stays silent.
    Where a collective has failed already, a short silence is enough. A main thread that waits in a collective cannot
    raise anything, so a second thread ends the process.

    As a context, which it is for as long as the run lives, it turns the failure of a collective into a `RunFault` that
    names the rank, and tells the others what this rank failed of. With one process it does nothing.
    """

    def __init__(self, accelerator: "Accelerator", timeout: float) -> None:
        self.step = 0
        self._rank, self._size = accelerator.process_index, accelerator.num_processes
        self._timeout = timeout
        self._urgent = False  # a collective has failed: find out soon
        self._verdict = ""
        self._heard = time.monotonic()  # of the main process
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if self._size == 1:
            return
        self._store = _open_store(accelerator)
        self._store.set(_key("who", self._rank), f"rank {self._rank} (pid {os.getpid()} on {socket.gethostname()})")
        self._store.set(_key("beat", self._rank), "0 0")
        accelerator.wait_for_everyone()
        self._thread = threading.Thread(target=self._talk, name="heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="heartbeat guard", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._thread is not None and error is not None and not isinstance(error, Stopped):
                self._explain(error)
        finally:
            self._close()

    def _explain(self, error: BaseException) -> None:
        if _is_of_collective(error):
            # The launcher, seeing a rank die, sends SIGTERM to the others: first the line that says which.
            with DeferredSignals("naming the process that was lost"):
                verdict = self._find_out()
            reason = verdict or f"another process was lost ({_first_line(error)})"
            raise RunFault(f"{reason}; the run goes on from its last checkpoint with --resume auto") from error
        self._accuse(self._rank, f"ended ({_first_line(error)})")

    def _close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(GRACE_SECONDS)

    def _talk(self) -> None:
        """Beat, and hear the verdict. A store whose process is stopped can keep this thread for ever: see `_guard`."""
        count, seen = 0, {rank: ("", time.monotonic()) for rank in range(self._size)}
        with suppress(torch.distributed.DistNetworkError):  # the store is gone, and the main process with it
            while not self._ended.wait(BEAT_SECONDS):
                count += 1
                with suppress(torch.distributed.DistStoreError):  # slow, this time
                    self._store.set(_key("beat", self._rank), f"{count} {self.step}")
                    if self._rank == 0:
                        self._look_after(seen)
                    self._verdict = self._store.get("verdict").decode()
                    self._heard = time.monotonic()
            self._store.set(_key("beat", self._rank), f"ended {self.step}")

    def _guard(self) -> None:
        """End this process if it does not end by itself once there is a verdict, or no word from the main process."""
        while not self._ended.wait(BEAT_SECONDS):
            silent = time.monotonic() - self._heard
            if self._rank != 0 and silent > self._limit() and not self._verdict:
                self._verdict = f"rank 0 (the main process) has given no sign of life for {silent:.0f} s"
            if self._verdict and not self._ended.wait(GRACE_SECONDS):
                self._end_process()

    def _limit(self) -> float:
        return SILENT_SECONDS if self._urgent else self._timeout

    def _look_after(self, seen: dict[int, tuple[str, float]]) -> None:
        """On the main process: note who has given a sign of life, accuse who has not."""
        now = time.monotonic()
        beats = [beat.decode() for beat in self._store.multi_get([_key("beat", rank) for rank in range(self._size)])]
        for rank, beat in enumerate(beats):
            if beat != seen[rank][0] or beat.startswith("ended"):
                seen[rank] = (beat, now)
        for rank, (_, since) in seen.items():
            if now - since > self._limit():
                self._accuse(rank, f"has given no sign of life for {now - since:.0f} s")
                return

    def _accuse(self, rank: int, what: str) -> None:
        """Tell all ranks; who does so first is believed."""
        with suppress(RuntimeError):
            who = self._store.get(_key("who", rank)).decode()
            self._store.compare_set("verdict", "", f"{who} {what}")

    def _find_out(self) -> str:
        """Which rank was lost, if that shows soon."""
        self._urgent = True
        deadline = time.monotonic() + SILENT_SECONDS + 4 * BEAT_SECONDS
        while not self._verdict and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 5)
        self._ended.set()
        return self._verdict or self._straggler()

    def _straggler(self) -> str:
        """All are alive, but a collective ran out of time: who has gone, or is behind?"""
        with suppress(RuntimeError):
            keys = [_key("beat", rank) for rank in range(self._size)]
            beats = [beat.decode().split() for beat in self._store.multi_get(keys)]
            for rank, (count, step) in enumerate(beats):
                if count == "ended" and rank != self._rank:
                    return f"{self._store.get(_key('who', rank)).decode()} ended after step {step}"
            steps = [int(step) for _, step in beats]
            slowest = steps.index(min(steps))
            if min(steps) < max(steps):
                who = self._store.get(_key("who", slowest)).decode()
                return f"{who} is alive, but hangs in step {min(steps) + 1} while others are in step {max(steps) + 1}"
        return ""

    def _end_process(self) -> NoReturn:
        line = f"batchcam: stopped: {self._verdict}; the run goes on from its last checkpoint with --resume auto\n"
        sys.stderr.write(line)
        sys.stderr.flush()
        os._exit(1)


@contextmanager
def lost_before_training() -> Iterator[None]:
    """One line for a process that is lost while the processes meet, before there is a heartbeat to name it."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunFault) or not _is_of_collective(error):
            raise
        # Launched again by such a launcher, processes may look for each other at the addresses of those before.
        advice = f"; {SHARED_STORE}" if restarts_may_not_meet() else ""
        raise RunFault(f"another process was lost while the processes met ({_first_line(error)}){advice}") from error


def _open_store(accelerator: "Accelerator") -> Any:
    """A store of its own: the one that processes met in may be served by a launcher that ends with any of them."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host = os.environ.get("MASTER_ADDR", "localhost")
    patience = timedelta(seconds=60)
    served: list[Any] = []

    def serve() -> str:
        served.append(TCPStore(host, 0, is_master=True, timeout=patience, wait_for_workers=False))
        served[0].set("verdict", "")
        return json.dumps([host, served[0].port])

    host, port = json.loads(decided_by_main(accelerator, serve))
    store = served[0] if served else TCPStore(host, port, timeout=patience, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=SILENT_SECONDS))
    return store


def _key(kind: str, rank: int) -> str:
    return f"{kind}/{rank}"


def _is_of_collective(error: BaseException) -> bool:
    """Whether a collective failed; gloo raises a plain RuntimeError."""
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("gloo", "nccl", "peer", "timed out", "timeout")
    return type(error) is RuntimeError and any(word in str(error).lower() for word in words)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
