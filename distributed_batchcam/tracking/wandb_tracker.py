"""Weights & Biases, talked to through a process of its own."""

import base64
import json
import logging
import os
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, cast

from PIL import Image
from tqdm import tqdm

from distributed_batchcam.checkpoint import write_atomic
from distributed_batchcam.config import RunConfig

from . import wandb_process
from .tracker import Picture, Value, numbers_of, options_of

logger = logging.getLogger(__name__)

FINISH_SECONDS = 150  # that W&B may take at the end of a run: to start, if it has not yet, and to upload
CLOSE_SECONDS = 10  # at the end of a run that was stopped
TELL_SECONDS = 3  # of waiting without a word


class WandbTracker:
    """Weights & Biases, in a process of its own (`wandb_process`), so that training never waits for it.

    The run is kept offline where W&B cannot be had; what is left on this machine at the end is named together with
    the command that sends it. A resumed run goes on as the same W&B run.
    """

    def __init__(self, config: RunConfig, run_dir: Path, last_step: int | None) -> None:
        """Start the process; W&B itself starts while the training does."""
        if find_spec("wandb") is None:
            raise ModuleNotFoundError("wandb is not installed: pip install 'distributed-batchcam[wandb]'")
        run_id, resumed = _run_id(run_dir / "wandb-run-id.txt")
        self._process = subprocess.Popen(  # noqa: S603 (our own script)
            [sys.executable, "-P", wandb_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # no terminal to ask for a login, and no Ctrl-C from it
        )
        self._replies = cast(BinaryIO, self._process.stdout)
        os.set_blocking(self._replies.fileno(), False)
        self._heard = b""
        self._last_words = ""
        self._warned = False
        self._folder: Path | None = None
        self._offline = self._synced = False
        self._calls: SimpleQueue[str | None] = SimpleQueue()
        # A thread, since a pipe that nobody reads blocks who writes into it.
        threading.Thread(target=self._send, daemon=True).start()
        place = (str(run_dir.absolute()), run_dir.name, run_id, resumed)
        self._call("start", *place, options_of(config), config.group, config.tags)

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        self._check()
        self._call("log", numbers_of(metrics), step)

    def show(self, name: str, picture: Picture, caption: str, step: int) -> None:
        self._check()
        png = BytesIO()
        Image.fromarray(picture).save(png, "png")
        self._call("show", name, base64.b64encode(png.getvalue()).decode(), caption, step)

    def finish(self, summary: Mapping[str, Value], files: Sequence[Path]) -> None:
        self._call("finish", dict(summary), [str(file.absolute()) for file in files], 0)
        if not self._wait(FINISH_SECONDS):
            self._process.kill()
            raise TimeoutError(f"W&B did not finish in {FINISH_SECONDS} seconds")
        self._check()

    def close(self) -> None:
        if self._process.poll() is None:
            self._call("finish", {}, [], 1)
            self._wait(CLOSE_SECONDS)  # if that is too short, the process goes on by itself, for a while
        self._calls.put(None)
        if self._folder is not None and not self._synced:
            parts = sorted(self._folder.parent.glob(f"offline-*{self._folder.name.rpartition('-')[2]}"))
            unsent = {part for part in parts if not list(part.glob("*.synced"))} | {self._folder}
            command = shlex.join(["wandb", "sync", *map(str, sorted(unsent))])
            print(f"batchcam: this sends the run to W&B: {command}", flush=True)

    def _call(self, method: str, *arguments: Any) -> None:
        self._calls.put(json.dumps([method, *arguments]))

    def _send(self) -> None:
        with suppress(OSError), cast(BinaryIO, self._process.stdin) as pipe:  # who has ended is noticed by `_listen`
            while (call := self._calls.get()) is not None:
                pipe.write(f"{call}\n".encode())
                pipe.flush()

    def _wait(self, seconds: float) -> bool:
        """Whether the process ends in that time; what it says meanwhile is taken note of."""
        start, told = time.monotonic(), False
        while self._process.poll() is None:
            waited = time.monotonic() - start
            if waited > seconds:
                return False
            if waited > TELL_SECONDS and not told:
                print(f"batchcam: waiting for W&B, at most {seconds:g} seconds", flush=True)
                told = True
            self._listen()
            time.sleep(0.02)
        self._listen()
        return True

    def _check(self) -> None:
        """Raise what the process ended with, if it has."""
        ended = self._process.poll()
        self._listen()
        if ended:
            raise RuntimeError(self._last_words or f"its process ended with status {ended}")

    def _listen(self) -> None:
        """Take note of what the process has said: replies, and W&B's own talk."""
        self._heard += self._replies.read() or b""
        *lines, self._heard = self._heard.split(b"\n")
        for line in filter(None, lines):
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError):
                self._last_words = line.decode(errors="replace")
                if "ERROR" in self._last_words:
                    self._warn(self._last_words)

    def _take(self, reply: dict[str, Any]) -> None:
        if "failure" in reply:
            self._last_words = reply["failure"]
        if "warning" in reply:
            self._warn(reply["warning"])
        if "folder" in reply:
            self._folder, self._offline = Path(reply["folder"]), reply["offline"]
        if reply.get("url"):
            tqdm.write(f"batchcam: W&B run {reply['url']}")
        if "finished" in reply:
            self._synced = not self._offline and not self._warned

    def _warn(self, text: str) -> None:
        if not self._warned:
            logger.warning("tracker wandb: %s", text)
        self._warned = True


def _run_id(file: Path) -> tuple[str, bool]:
    """The id of the W&B run of a run directory, and whether it was there before."""
    found = file.read_text().strip() if file.exists() else ""
    chosen = os.environ.get("WANDB_RUN_ID") or found or secrets.token_hex(4)
    write_atomic(file, f"{chosen}\n".encode())
    return chosen, chosen == found
