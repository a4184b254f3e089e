"""One process at a time in a run directory."""

import errno
import fcntl
import json
import os
import socket
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from .errors import InUseError

NAME = "run.lock"
_held: set[BinaryIO] = set()


class RunLock:
    """The lock of a run directory, held by its main process until `release` or the end of the process.

    The kernel keeps it (flock) and drops it when the process dies, however that happens: a lock cannot outlive its
    run, and there are no stale ones to tell from others. The file says who holds it, for the message. NFS carries
    flock over to other machines since Linux 2.6.12, unless mounted with `nolock`. Where a file system keeps no locks
    at all, a live process of this machine is still found by its id; one of another machine is not, which is said.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            InUseError: another process holds it; the message names it.
            OSError: the file cannot be written.
        """
        self._path = folder / NAME
        self._renewing = threading.Lock()
        self._file = _take(self._path)

    def lost(self) -> bool:
        """Whether its file is gone, as it is where the folder was deleted: another process may lock a new one."""
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return True

    def renew(self) -> None:
        """Take the lock again if it is lost.

        Raises:
            InUseError, OSError: as at first.
        """
        with self._renewing:  # checkpoints are written in a thread, beside the last files of a run
            if self.lost():
                old, self._file = self._file, _take(self._path)
                _leave(old)

    def release(self) -> None:
        """Let others in; the empty file stays, since one that is deleted could be locked twice."""
        if self._file in _held:
            _leave(self._file)


def _take(path: Path) -> BinaryIO:
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(file)
        # But for these two this file system keeps no locks: ENOLCK, ENOTSUP, ENOSYS, …
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES) or _runs_here(holder):
            file.close()
            raise _in_use(path.parent, holder) from None
        print(
            f"batchcam: the file system of {path.parent} keeps no locks ({error.strerror}): make sure that no other "
            "machine trains into it",
            flush=True,
        )
    _held.add(file)
    note = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    file.truncate(0)
    file.write(json.dumps(note).encode())
    file.flush()
    return file


def _leave(file: BinaryIO) -> None:
    _held.discard(file)
    file.truncate(0)
    with suppress(OSError):  # kept no locks
        fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def _holder(file: BinaryIO) -> dict[str, object]:
    try:
        file.seek(0)
        found = json.loads(file.read(1000))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _in_use(folder: Path, holder: dict[str, object]) -> InUseError:
    who = " ".join(f"{word} {holder[key]}" for key, word in _WORDS.items() if key in holder)
    return InUseError(
        f"--out {folder} is in use by another process ({who or 'unknown'}): let it end, or choose another folder"
    )


_WORDS = {"pid": "pid", "host": "on", "since": "since"}


def _runs_here(holder: dict[str, object]) -> bool:
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _forget() -> None:
    """In a forked child (a decoder of images), close what would keep a dead parent's lock alive."""
    for file in _held:
        os.close(file.fileno())
    _held.clear()


os.register_at_fork(after_in_child=_forget)
