"""Start the command line in processes of its own, as users do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Small enough for seconds: 16×16 digits.
SMALL = ["--dataset", "digits", "--image-size", "16", "--batch-size", "64", "--device", "cpu"]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


def batchcam(*arguments: str, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess[str]:
    """`python -m distributed_batchcam …` in one process."""
    command = [sys.executable, "-m", "distributed_batchcam", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment(**extra))


def launch(*arguments: str, flags: list[str], cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch FLAGS -m distributed_batchcam …`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "distributed_batchcam", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
    )


def gloo(processes: int) -> list[str]:
    return ["--config_file", str(ROOT / "cluster/accelerate/cpu_gloo.yaml"), "--num_processes", str(processes)]
