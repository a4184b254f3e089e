"""One process at a time in a run directory."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment
from short_runs import train

from distributed_batchcam.config import make_config
from distributed_batchcam.errors import InputError, InUseError
from distributed_batchcam.run_directory import RunDirectory
from distributed_batchcam.run_lock import NAME, RunLock

HOLD = "import sys, time; from pathlib import Path; from distributed_batchcam.run_lock import RunLock\n"
HOLD += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_a_run_directory_in_use_is_refused_until_its_process_is_dead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(out, "--epochs", "1") == 0
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, env=environment())
    assert holder.stdout is not None
    holder.stdout.readline()
    before = (out / "config.yaml").read_bytes()
    assert train(out, "--epochs", "1", "--resume", "auto") == 2
    said = capsys.readouterr().err
    assert f"is in use by another process (pid {holder.pid} on {os.uname().nodename} since " in said
    assert (out / "config.yaml").read_bytes() == before
    holder.kill()
    holder.communicate()
    assert (out / NAME).read_text() != "", "what the dead process wrote is still there"
    assert train(out, "--epochs", "1", "--resume", "auto") == 0


def test_a_lock_is_free_again_after_its_release(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(InputError, match=f"in use by another process .pid {os.getpid()}"):
        RunLock(tmp_path)
    lock.release()
    RunLock(tmp_path).release()


def test_a_run_whose_folder_vanished_locks_the_new_one_and_leaves_another_runs_alone(tmp_path: Path) -> None:
    config = make_config({"epochs": 3, "out": tmp_path / "run"})
    directory = RunDirectory(tmp_path / "run", resumed=False)
    directory.claim()
    directory.write_config(config)
    directory.hold(config)
    shutil.rmtree(directory.path)
    directory.hold(config)
    assert (directory.path / "config.yaml").read_text() == config.to_yaml()
    with pytest.raises(InUseError, match=f"in use by another process .pid {os.getpid()}"):
        RunLock(directory.path)

    shutil.rmtree(directory.path)
    other = RunDirectory(directory.path, resumed=False)
    other.claim()
    with pytest.raises(InUseError, match=f"in use by another process .pid {os.getpid()}"):
        directory.hold(config)
    theirs = make_config({"epochs": 5})
    other.write_config(theirs)
    other.release()
    for _ in range(2):
        with pytest.raises(InUseError, match="has become another run's"):
            directory.hold(config)
    assert (directory.path / "config.yaml").read_text() == theirs.to_yaml()
    directory.release()


ORPHAN = "import os, sys, time; from pathlib import Path; from distributed_batchcam.run_lock import RunLock\n"
ORPHAN += "lock = RunLock(Path(sys.argv[1])); child = os.fork()\n"
ORPHAN += "time.sleep(0.5) if child else time.sleep(60)\nprint(child); sys.stdout.flush(); os._exit(0)"


def test_an_orphaned_child_does_not_keep_the_lock_of_a_dead_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.wait(10)
    try:
        RunLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_without_locks_a_live_process_of_this_machine_is_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(file: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    note = {"pid": os.getppid(), "host": os.uname().nodename}
    (tmp_path / NAME).write_text(json.dumps(note))
    with pytest.raises(InputError, match=f"pid {os.getppid()}"):
        RunLock(tmp_path)
    (tmp_path / NAME).write_text(json.dumps({**note, "host": "elsewhere"}))
    RunLock(tmp_path).release()
    assert "keeps no locks (No locks available)" in capsys.readouterr().out
