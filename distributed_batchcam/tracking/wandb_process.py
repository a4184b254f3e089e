"""W&B in a process of its own: a script that `tracking.WandbTracker` starts and talks to.

Whatever W&B does - wait for a network, ask for a login, lose its service, never return from finish(), hook into
exits and exceptions - it does here, and training goes on. The process reads lines of JSON, [method, *arguments],
from its standard input and writes one JSON object a line to its standard output; other lines there are W&B's own
talk. It imports nothing of the package, and ends within `ORPHAN_SECONDS` of the training process.
"""

import base64
import json
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

START_SECONDS = 30  # to reach W&B, before the run is kept offline
FINISH_SECONDS = 100  # to upload what is left at the end
ORPHAN_SECONDS = 120


class Writer:
    """One W&B run."""

    def __init__(
        self,
        folder: str,
        name: str,
        run_id: str,
        resumed: bool,
        config: Mapping[str, Any],
        group: str | None,
        tags: Sequence[str],
    ) -> None:
        """Start the run, online if possible; WANDB_… variables and W&B's settings files go before our defaults."""
        import wandb

        known = wandb.setup().settings
        # What the user has set by a variable stays; settings differ between W&B's versions.
        ours: dict[str, Any] = {
            "console": "off",  # nothing of interest is printed here
            "init_timeout": START_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "finish_timeout_raises": True,
            "x_stats_pid": os.getppid(),  # the process to measure is the one that trains
        }
        unset = {
            key: value
            for key, value in ours.items()
            if key in wandb.Settings.model_fields and f"WANDB_{key.upper()}" not in os.environ
        }
        arguments: dict[str, Any] = {
            "project": known.project or "batchcam",
            "name": known.run_name or name,
            "dir": None if "WANDB_DIR" in os.environ else folder,
            "id": run_id,
            "resume": "allow" if resumed else None,
            "config": config,
            "group": group,
            "tags": tags or None,
            "settings": wandb.Settings(**unset),
        }
        try:
            self._run = wandb.init(**arguments)
        except Exception as error:  # no login, no network, no such project: W&B has many names for them
            wandb.teardown()  # its service would not give the same id twice
            self._run = wandb.init(**{**arguments, "mode": "offline"})
            _say(warning=f"W&B cannot be had online ({_reason(error)}); the run is kept offline")
        if not self._run.disabled:
            offline = self._run.offline
            _say(folder=str(Path(self._run.dir).parent), offline=offline, url=None if offline else self._run.url)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=self._step(step))

    def show(self, name: str, png: str, caption: str, step: int) -> None:
        import wandb
        from PIL import Image

        with Image.open(BytesIO(base64.b64decode(png))) as picture:
            self._run.log({name: wandb.Image(picture, caption=caption)}, step=self._step(step))

    def finish(self, summary: Mapping[str, Any], files: Sequence[str], exit_code: int) -> None:
        import wandb

        self._run.summary.update(dict(summary))
        try:
            if files:
                artifact = wandb.Artifact(f"batchcam-{self._run.id}", type="model")
                for file in files:
                    artifact.add_file(file)
                self._run.log_artifact(artifact)
        finally:
            self._run.finish(exit_code=exit_code)
        _say(finished=True)

    def _step(self, step: int) -> int:
        # W&B drops what lies behind its newest step: the steps that a resumed run does again go there instead.
        return max(step, self._run.step)


def main() -> None:
    """Serve calls until their end; the first is the arguments of `Writer`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the training, whose last words are still to come
    threading.Thread(target=_end_as_orphan, args=(os.getppid(),), daemon=True).start()
    status = 0
    try:
        _serve()
    except Exception as error:
        _say(failure=_reason(error))
        status = 1
    # Not through W&B's exit handlers, which fail in turn, or wait for a network that is not there.
    os._exit(status)


def _serve() -> None:
    _, *arguments = json.loads(sys.stdin.readline())
    writer = Writer(*arguments)
    for line in sys.stdin:
        if not line.endswith("\n"):
            break
        method, *arguments = json.loads(line)
        getattr(writer, method)(*arguments)
        if method == "finish":
            return
    # The training was killed, and with it who reads what is printed.
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    writer.finish({}, (), 1)


def _end_as_orphan(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def _say(**reply: object) -> None:
    print("\n" + json.dumps(reply), flush=True)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return textwrap.shorten(text, 160) if text and text != "<no message>" else type(error).__name__


if __name__ == "__main__":
    main()
