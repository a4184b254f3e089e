"""One process at a time in a run directory."""

import errno
import fcntl
import json
import os
import socket
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
        self._file = self._path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder()
            self._file.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise _in_use(folder, holder) from None
            # ENOLCK, ENOTSUP, ENOSYS, …: this file system keeps no locks.
            if _runs_here(holder):
                raise _in_use(folder, holder) from None
            print(
                f"batchcam: the file system of {folder} keeps no locks ({error.strerror}): make sure that no other "
                "machine trains into it",
                flush=True,
            )
            self._file = self._path.open("a+b")
        _held.add(self._file)
        note = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._file.truncate(0)
        self._file.write(json.dumps(note).encode())
        self._file.flush()

    def release(self) -> None:
        """Let others in; the empty file stays, since one that is deleted could be locked twice."""
        if self._file in _held:
            _held.discard(self._file)
            self._file.truncate(0)
            with suppress(OSError):  # kept no locks
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()

    def _holder(self) -> dict[str, object]:
        try:
            self._file.seek(0)
            found = json.loads(self._file.read(1000))
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
