"""Where a sweep lives: a folder that every node sees, or a URI such as s3://bucket/path that runs are mirrored to.

trials/NAME/        an ordinary run directory per trial
logs/NAME.log       what each trial said
sweep.json          the space, and where every trial stands
leaderboard.csv     trials that differ by their seed alone together, the best first
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from distributed_batchcam.checkpoint import write_atomic
from distributed_batchcam.errors import InputError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

SWEEP, LEADERBOARD, TRIALS, LOGS = "sweep.json", "leaderboard.csv", "trials", "logs"
_URI = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_CHUNK = 1 << 24


class Storage:
    """A folder; see `RemoteStorage` for a URI. Names are relative paths with forward slashes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    @staticmethod
    def at(place: str) -> "Storage":
        """The storage at a path or URI.

        Raises:
            InputError: a URI of a kind that is not known here.
        """
        return RemoteStorage.at_uri(place) if _URI.match(place) else Storage(Path(place).expanduser().absolute())

    def read(self, name: str) -> bytes | None:
        """Content of a file; None where there is none."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, atomically; folders on the way are made."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.root / name, content)

    def is_empty(self) -> bool:
        """Whether nothing is there yet."""
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"--storage {self} is a file: name a folder")
        return not self.root.exists() or not any(self.root.iterdir())

    @contextmanager
    def trial(self, name: str) -> Iterator["TrialFolder"]:
        """The run directory of a trial on this machine, as far as it has come."""
        log = self.root / LOGS / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        yield TrialFolder(self.root / TRIALS / name, log)

    def copy(self, name: str, path: Path) -> bool:
        """Copy the run directory of a trial to a path on this machine; False where the path needs none."""
        return False


class TrialFolder:
    """The run directory and the log of a trial on this machine; in a shared folder they need no copying."""

    def __init__(self, path: Path, log: Path) -> None:
        self.path = path
        self.log = log

    def push(self) -> None:
        """Send to the storage what has changed since the last time."""


class RemoteStorage(Storage):
    """Object storage or another file system that pyarrow reaches: S3, Google Cloud Storage, HDFS, file://."""

    def __init__(self, uri: str, files: "FileSystem", base: str) -> None:
        self.uri = uri
        self._files = files
        self._base = base.rstrip("/")

    @classmethod
    def at_uri(cls, uri: str) -> Self:
        try:
            from pyarrow.fs import FileSystem
        except ImportError:
            raise InputError(f"--storage {uri} needs pyarrow: pip install 'distributed-batchcam[tune]'") from None
        try:
            files, base = FileSystem.from_uri(uri)
        except Exception as error:  # whatever a file system and its network come up with
            raise InputError(f"--storage {uri} cannot be used: {' '.join(str(error).split())}") from error
        return cls(uri, files, base)

    def __str__(self) -> str:
        return self.uri

    def read(self, name: str) -> bytes | None:
        try:
            with self._files.open_input_file(self._at(name)) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        # An object store shows an object once it is whole; elsewhere a finished file is moved into place.
        is_object_store = self._files.type_name in ("s3", "gcs", "abfs")
        target = self._at(name)
        aside = target if is_object_store else f"{target}.tmp"
        self._files.create_dir(target.rpartition("/")[0])
        with self._files.open_output_stream(aside) as file:
            file.write(content)
        if not is_object_store:
            self._files.move(aside, target)

    def is_empty(self) -> bool:
        return not self.list("")

    @contextmanager
    def trial(self, name: str) -> Iterator[TrialFolder]:
        with tempfile.TemporaryDirectory(prefix="batchcam-") as temporary:
            folder = _Mirror(self, name, Path(temporary))
            folder.fetch()
            try:
                yield folder
            finally:
                folder.push()

    def copy(self, name: str, path: Path) -> bool:
        for file in self.list(f"{TRIALS}/{name}"):
            self.fetch(f"{TRIALS}/{name}/{file}", path / file)
        return True

    def list(self, name: str) -> set[str]:
        """Paths of all files below a folder, from there."""
        from pyarrow.fs import FileSelector, FileType

        base = self._at(name)
        found = self._files.get_file_info(FileSelector(base, allow_not_found=True, recursive=True))
        return {entry.path.removeprefix(base).lstrip("/") for entry in found if entry.type == FileType.File}

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to this machine."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._files.open_input_stream(self._at(name)) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, _CHUNK)

    def send(self, source: Path, name: str) -> None:
        """Copy a file from this machine."""
        target = self._at(name)
        self._files.create_dir(target.rpartition("/")[0])
        with source.open("rb") as file, self._files.open_output_stream(target) as sink:
            shutil.copyfileobj(file, sink, _CHUNK)

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._files.delete_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._base}/{name}".rstrip("/")


class _Mirror(TrialFolder):
    """A run directory with a copy in remote storage.

    A copy that was cut off does no harm: checkpoints carry checksums, and a run goes on from the newest intact one.
    """

    def __init__(self, storage: RemoteStorage, name: str, folder: Path) -> None:
        self._name = name
        self._logs = f"{LOGS}/{name}.log"
        super().__init__(folder / TRIALS / name, folder / self._logs)
        self._folder = folder
        self._storage = storage
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of change

    def fetch(self) -> None:
        """Take up what the storage holds of the trial."""
        self._storage.copy(self._name, self.path)
        self.log.parent.mkdir()
        if (log := self._storage.read(self._logs)) is not None:
            self.log.write_bytes(log)
        self._sent = self._local()

    def push(self) -> None:
        local = self._local()
        # In the order in which they were written, so that no file refers to one that is not there yet.
        for name, state in sorted(local.items(), key=lambda item: item[1][1]):
            if self._sent.get(name) != state:
                self._storage.send(self._folder / name, name)
        for name in self._sent.keys() - local.keys():
            self._storage.remove(name)
        self._sent = local

    def _local(self) -> dict[str, tuple[int, int]]:
        files = [path for path in self._folder.rglob("*") if path.is_file()]
        states = [path.stat() for path in files]
        return {
            path.relative_to(self._folder).as_posix(): (state.st_size, state.st_mtime_ns)
            for path, state in zip(files, states, strict=True)
        }
