"""The batch scripts really start their nodes: here they are this machine, and `slurm_bin` stands in for Slurm.

What that cannot show (that Slurm takes the #SBATCH lines, places the steps and sends the signals) needs a cluster.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_files import CLUSTER, assert_shell_is_sound
from launching import ROOT, SMALL, environment

SCRIPTS = sorted((CLUSTER / "slurm").glob("*.sbatch"))
# Ports and folders follow from a job's number: those of another session of tests must not be the same.
JOB = 10 * (os.getpid() % 1000)
RUN = [*SMALL, "--epochs", "2", "--objective", "bcpl_l1"]


def job(script: str, *arguments: str, folder: Path, number: int, nodes: int = 2, **extra: str) -> subprocess.Popen[str]:
    """Start a batch script as Slurm does, in an allocation of `nodes`."""
    here = Path(__file__).parent
    return subprocess.Popen(
        [str(CLUSTER / "slurm" / script), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(
            PATH=f"{here / 'slurm_bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            SLURM_JOB_ID=str(number),
            SLURM_JOB_NODELIST=f"node[1-{nodes}]",
            SLURM_NNODES=str(nodes),
            SLURM_CPUS_PER_TASK="1",
            SCONTROL_LOG=str(folder / "scontrol.log"),
            SLURM_STEPS=str(folder / "steps"),
            **{"ACCELERATE_USE_CPU": "true", "PROCESSES_PER_NODE": "1", **extra},
        ),
    )


def finish(process: subprocess.Popen[str], seconds: float = 240) -> str:
    """What the job said; it must end by itself."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_script_is_sound(script: Path) -> None:
    assert_shell_is_sound(script.read_text())
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_job_can_be_queued_again_before_its_time_is_over(script: Path) -> None:
    asked = [line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    # B: the batch shell gets the signal, which decides what to do.
    assert {"requeue", "signal=B:USR1@180", "open-mode=append", "ntasks-per-node=1"} <= set(asked)


def test_an_allocation_without_gpus_is_told_what_to_do(tmp_path: Path) -> None:
    process = job("train.sbatch", folder=tmp_path, number=JOB, PROCESSES_PER_NODE="")
    assert "set PROCESSES_PER_NODE" in finish(process)
    assert process.returncode != 0


@pytest.mark.slow
def test_two_nodes_train_one_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = job("train.sbatch", *RUN, "--out", str(out), folder=tmp_path, number=JOB + 1)
    said = finish(process)
    assert process.returncode == 0, said
    assert "2 processes on cpu (gloo)" in said
    assert json.loads((out / "summary.json").read_text())["world_size"] == 2
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.slow
def test_a_run_that_is_out_of_time_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [*SMALL, "--epochs", "8", "--out", str(out)]
    process = job("train.sbatch", *options, folder=tmp_path, number=JOB + 2)
    deadline = time.monotonic() + 180
    while not (out / "checkpoints/epoch_00001").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    said = finish(process)
    assert process.returncode != 0, said
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {JOB + 2}\n"
    assert not (out / "summary.json").exists()
    process = job("train.sbatch", *options, folder=tmp_path, number=JOB + 2, SLURM_RESTART_COUNT="1")
    said = finish(process)
    assert process.returncode == 0, said
    assert "resuming from" in said
    assert json.loads((out / "summary.json").read_text())["epochs"] == 8


# Stands in for `batchcam`: what counts here is the cluster that it finds.
SWEEP = f"""#!{sys.executable}
import os, signal, sys, time
import ray
print("arguments:", *sys.argv[1:], flush=True)
ray.init(address=sys.argv[sys.argv.index("--address") + 1], log_to_driver=False)
deadline = time.monotonic() + 90
while len(alive := [node for node in ray.nodes() if node["Alive"]]) < 2 and time.monotonic() < deadline:
    time.sleep(0.2)

@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def place():
    time.sleep(1)
    return ray.get_runtime_context().get_node_id()

print(len(alive), "nodes,", len(set(ray.get([place.remote() for _ in alive]))), "in use", flush=True)
if os.environ.get("WAIT"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    open(os.environ["WAIT"], "w").close()
    time.sleep(120)
sys.exit(3)
"""


@pytest.fixture
def sweep_bin(tmp_path: Path) -> str:
    pytest.importorskip("ray", reason="ray is not installed (the tune extra brings it)")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "batchcam").write_text(SWEEP)
    (folder / "batchcam").chmod(0o755)
    return str(folder)


def processes_of(folder: str) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if folder in line]


@pytest.mark.slow
def test_a_sweep_gets_a_cluster_of_all_nodes_and_leaves_nothing_behind(sweep_bin: str, tmp_path: Path) -> None:
    process = job("sweep.sbatch", "--space", "smoke", folder=tmp_path, number=JOB + 3, BATCHCAM_BIN=sweep_bin)
    said = finish(process)
    assert "arguments: sweep --address auto --space smoke\n" in said
    assert "2 nodes, 2 in use" in said
    assert process.returncode == 3, "the job ends as the sweep does"
    assert not Path(f"/tmp/batchcam-ray-{JOB + 3}").exists()
    assert processes_of(f"/tmp/batchcam-ray-{JOB + 3}") == []
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.slow
def test_a_sweep_that_is_out_of_time_is_queued_again_and_resumes(sweep_bin: str, tmp_path: Path) -> None:
    started = tmp_path / "started"
    settings = {"BATCHCAM_BIN": sweep_bin, "WAIT": str(started), "SLURM_RESTART_COUNT": "1"}
    process = job("sweep.sbatch", "--space", "smoke", folder=tmp_path, number=JOB + 4, **settings)
    deadline = time.monotonic() + 180
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    said = finish(process)
    assert process.returncode == 143, said
    assert "arguments: sweep --address auto --space smoke --resume\n" in said
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {JOB + 4}\n"
    assert processes_of(f"/tmp/batchcam-ray-{JOB + 4}") == []
