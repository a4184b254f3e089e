"""SIGTERM and SIGINT: stop after a whole step, with a checkpoint."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, NoReturn, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_SECONDS = 1.0
"""A terminal and a launcher both pass Ctrl-C on: a signal that follows the first so soon is the same request."""


class Stopped(Exception):
    """Training stopped after a checkpoint, since some rank received the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class DeferredSignals:
    """Within this context SIGTERM and SIGINT are noted in `received`; a second one ends the process at once.

    Signals that are ignored stay ignored, and the handlers are put back at the end. Outside the main thread, where
    Python has no say in signals, nothing is installed.
    """

    def __init__(self, doing: str = "stopping after a checkpoint") -> None:
        self._doing = doing  # what a user who sent one is told
        self.received = 0
        self._process = os.getpid()
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # None: a handler that Python did not install and could not put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked decoder of images, which Ctrl-C reaches too: it serves until it is told to end
        if not self.received:
            self.received, self._at = number, time.monotonic()
            # Not print(): the handler may have interrupted one.
            os.write(2, f"batchcam: {signal.Signals(number).name}: {self._doing}\n".encode())
        elif time.monotonic() - self._at > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def pass_on(stopped: Stopped) -> NoReturn:
    """Deliver the signal that stopped a training to whoever handled it before; exits if nobody did."""
    if threading.current_thread() is threading.main_thread():
        signal.raise_signal(stopped.number)
    raise SystemExit(128 + stopped.number)
