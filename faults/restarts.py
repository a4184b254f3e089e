"""Launches that somebody else starts again: whether the run goes on as it would have, and how soon."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import yaml

from .kills import undisturbed
from .runs import OPTIONS, Figures, difference, finish, fresh, lines_so_far

ROOT = Path(__file__).parents[1]
PATIENCE = 900
EPOCHS = 8  # long enough to be met in the middle
LONGER = ("--epochs", str(EPOCHS))

LAUNCHERS = {
    "torchrun --max-restarts": [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "3",
    ],
    "accelerate launch --max_restarts": [
        *("accelerate.commands.launch", "--config_file", str(ROOT / "cluster/accelerate/cpu_gloo.yaml")),
        *("--num_processes", "2", "--max_restarts", "3"),
    ],
}
"""Elastic ones: when a rank dies they end the others, and start all again."""


class Launch:
    """A command in a process of its own; its output is added to a file."""

    def __init__(self, log: Path, command: list[str], **environment: str) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], object], what: str) -> str | None:
        """Return when something is so, or what went wrong."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None:
                return f"ended with {self.process.returncode} before {what}: {self.said()[-500:]}"
            if time.monotonic() > deadline:
                return f"waited {PATIENCE} s for {what}: {self.said()[-500:]}"
            time.sleep(0.01)
        return None

    def end(self) -> str | None:
        """Return when it has ended well, or what went wrong."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = None
        return f"ended with {status}: {self.said()[-500:]}" if status != 0 else None

    def kill(self) -> None:
        """End what is left of it."""
        for process in self._family():
            process.kill()
        self.process.wait()

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        return next(process for process in self._family() if process.environ().get("RANK") == str(number))

    def _family(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        launcher = psutil.Process(self.process.pid)
        return [*launcher.children(recursive=True), launcher]


def of_elastic_launcher(folder: Path, name: str, times: int, seed: int) -> Figures:
    """kill -9 of one of two ranks, in the middle of the run."""
    figures, dice = Figures(f"kill -9 of one of two ranks under `{name}`", "restart"), random.Random(seed)
    whole, _ = undisturbed(folder, size=2, options=LONGER)
    command = [sys.executable, "-m", *LAUNCHERS[name], "-m", "distributed_batchcam", *OPTIONS, *LONGER]
    for _ in range(times):
        out, log, victim = fresh(folder / "restarted"), fresh(folder / "restarted.log"), dice.randrange(2)
        launch = Launch(log, [*command, "--out", str(out)], ACCELERATE_USE_CPU="true")
        failure = launch.wait_for(partial(_is_under_way, out), "the middle of the run")
        time.sleep(dice.uniform(0, 0.5))
        if failure is None:
            before = lines_so_far(out)
            launch.rank(victim).kill()
            failure = _goes_on(launch, out, log, before, figures) or launch.end()
        launch.kill()
        failure = failure or difference(out, whole)
        figures.count(None if failure is None else f"rank {victim}: {failure}")
    figures.note = f"seed {seed}"
    return figures


def of_requeued_job(folder: Path, times: int, seed: int) -> Figures:
    """The Slurm script, whose time is over in the middle of the run; programs of the tests stand in for Slurm."""
    figures, dice = Figures("`cluster/slurm/train.sbatch` on two nodes, queued again", "restart"), random.Random(seed)
    whole, _ = undisturbed(folder, size=2, options=LONGER)
    stand_ins = f"{ROOT / 'tests/cluster/slurm_bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    for number in range(times):
        out, log, queue = (fresh(folder / name) for name in ("requeued", "requeued.log", "scontrol.log"))
        command = [str(ROOT / "cluster/slurm/train.sbatch"), *OPTIONS[1:], *LONGER, "--out", str(out)]
        slurm = {
            "PATH": stand_ins,
            "ACCELERATE_USE_CPU": "true",
            "PROCESSES_PER_NODE": "1",
            "SLURM_JOB_ID": str(os.getpid() + number),
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": "1",
            "SCONTROL_LOG": str(queue),
            "SLURM_STEPS": str(fresh(folder / "steps")),
        }
        launch = Launch(log, command, **slurm)
        failure = launch.wait_for(partial(_is_under_way, out), "the middle of the run")
        time.sleep(dice.uniform(0, 0.5))
        if failure is None:
            before, since = lines_so_far(out), time.monotonic()
            launch.process.send_signal(signal.SIGUSR1)
            launch.process.wait(PATIENCE)
            figures.took("to stop", time.monotonic() - since)
            if queue.exists():
                launch = Launch(log, command, **slurm)
                failure = _goes_on(launch, out, log, before, figures) or launch.end()
            else:
                failure = f"not queued again: {launch.said()[-500:]}"
        launch.kill()
        figures.count(failure or difference(out, whole))
    figures.note = f"seed {seed}; without the time that a real job waits in the queue"
    return figures


def of_ray_trial(folder: Path, times: int) -> Figures:
    """kill -9 of the process of a trial, once in each of so many trials of a sweep."""
    figures, storage = (
        Figures("kill -9 of a trial's process under `batchcam sweep`", "restart"),
        fresh(folder / "sweep"),
    )
    options = [*OPTIONS[1:], *LONGER]
    named = {name[2:].replace("-", "_"): value for name, value in zip(options[::2], options[1::2], strict=True)}
    fixed = {name: yaml.safe_load(value) for name, value in named.items() if name != "resume"}
    space = folder / "space.yaml"
    space.write_text(yaml.safe_dump({"fixed": fixed, "grid": {"seed": list(range(times))}}))
    command = [sys.executable, "-m", "tune.sweep", "--space", str(space), "--storage", str(storage)]
    launch = Launch(
        fresh(folder / "sweep.log"),
        [*command, "--gpus-per-worker", "0", "--max-concurrent", "1"],
    )
    killed: dict[Path, str | None] = {}  # the run directory of a trial, and what went wrong

    def next_trial() -> Path | None:
        found = (path for path in storage.glob("trials/*") if path not in killed and _is_under_way(path))
        return next(found, None)

    for _ in range(times):
        if launch.wait_for(next_trial, "the next trial"):
            break
        trial = next_trial()
        assert trial is not None
        log = storage / "logs" / f"{trial.name}.log"
        process = int(re.findall(r"process (\d+)$", log.read_text(), re.MULTILINE)[-1])
        before = lines_so_far(trial)
        os.kill(process, signal.SIGKILL)
        killed[trial] = _goes_on(launch, trial, log, before, figures)
    ended = launch.end()
    launch.kill()
    for trial, failure in killed.items():
        seed = yaml.safe_load((trial / "config.yaml").read_text())["seed"]
        alone, _ = finish(fresh(folder / "alone"), [*LONGER, "--seed", str(seed)])
        figures.count(failure or ended or alone or difference(trial, folder / "alone"))
    for _ in range(times - len(killed)):
        figures.count(f"not tried: {ended}")
    figures.note = "one trial at a time"
    return figures


def _is_under_way(out: Path) -> bool:
    """Whether a run of `EPOCHS` is somewhere in its middle."""
    return any(out.glob("checkpoints/epoch_0000[2-6]*"))


def _goes_on(launch: Launch, out: Path, log: Path, before: int, figures: Figures) -> str | None:
    """Return when a run that has just been disturbed is further than it was, or what went wrong."""
    since = time.monotonic()
    failure = launch.wait_for(
        lambda: "resuming from" in log.read_text(errors="replace") and lines_so_far(out) > before,
        "the run to be further than it was",
    )
    figures.took("until it is further than it was", time.monotonic() - since)
    return failure
