"""Where the files of a dataset are, and how missing ones get there."""

import http.client
import os
import socket
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distributed_batchcam.errors import InputError

_DEFAULT = Path("data")
_VARIABLE = "BATCHCAM_DATA"
_SECONDS_OF_SILENCE = 30.0


def resolve_root(data_root: str | Path | None) -> Path:
    """The folder of the datasets: the argument, else $BATCHCAM_DATA, else data/ (which may not exist yet).

    Raises:
        InputError: a folder that was named but is not there.
    """
    named = data_root or os.environ.get(_VARIABLE)
    if not named:
        return _DEFAULT.resolve()
    root = Path(named).expanduser()
    if not root.is_dir():
        origin = "--data-root" if data_root else f"${_VARIABLE}"
        raise InputError(f"no folder {root} ({origin}); name the one that holds the datasets")
    return root.resolve()


def require_folder(root: Path) -> None:
    """Require that `root` exists, for a dataset that cannot be downloaded."""
    if not root.is_dir():
        raise InputError(f"no folder {root}; name the one with your images by --data-root or ${_VARIABLE}")


def fetch_files(dataset: str, root: Path, missing: Sequence[str], fetch: Callable[[Path], object]) -> None:
    """Fetch the `missing` files of a dataset, named relative to `root`; where none is, nothing is tried.

    Args:
        dataset: its name, for messages.
        root: folder of the datasets; created where it is not there yet.
        missing: the files that are not there.
        fetch: downloads the whole dataset into a folder that it is given.

    Raises:
        InputError: that failed; `root` is then as it was before.
    """
    if not missing:
        return
    print(f"{dataset}: {', '.join(missing)} not found in {root}; fetching", file=sys.stderr)
    created = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Below root, so that each file can be moved into its place at once, on the same disk.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder, _socket_timeout():
            fetch(Path(folder))
            if absent := [name for name in missing if not Path(folder, name).is_file()]:
                raise FileNotFoundError(f"it brought no {', '.join(absent)}")
            for name in missing:
                target = root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(folder, name), target)
    # What torchvision lets out of a failed download, a wrong checksum or a damaged archive.
    except (OSError, RuntimeError, EOFError, zlib.error, http.client.HTTPException) as error:
        if created and root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{dataset}: {', '.join(missing)} not found in {root}, and the download failed ({reason}); "
            f"put the files there, or name their folder by --data-root or ${_VARIABLE}"
        ) from error


@contextmanager
def _socket_timeout() -> Iterator[None]:
    """Give up on a silent server, as behind many a cluster's firewall: torchvision sets no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS_OF_SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
