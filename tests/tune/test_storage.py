"""Storage: a folder and a URI serve trials alike."""

import json
from pathlib import Path

import pytest

from distributed_batchcam.errors import InputError
from tune.storage import RemoteStorage, Storage

pytest.importorskip("pyarrow", reason="URIs need pyarrow: pip install 'distributed-batchcam[tune]'")


@pytest.fixture(params=["folder", "uri"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    place = tmp_path / "sweep"
    return Storage.at(str(place) if request.param == "folder" else f"file://{place}")


def test_small_files_are_written_whole_and_read_back(storage: Storage, tmp_path: Path) -> None:
    assert storage.is_empty()
    assert storage.read("sweep.json") is None
    storage.write("sweep.json", b"one")
    storage.write("sweep.json", b"two")
    storage.write("a/b.txt", b"three")
    assert storage.read("sweep.json") == b"two"
    assert (tmp_path / "sweep/a/b.txt").read_bytes() == b"three"
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["a", "sweep.json"], "nothing left aside"
    assert not storage.is_empty()


def test_a_trial_finds_what_an_earlier_attempt_left(storage: Storage, tmp_path: Path) -> None:
    with storage.trial("x=1,ab") as folder:
        assert not folder.path.exists()
        (folder.path / "checkpoints/epoch_00001").mkdir(parents=True)
        (folder.path / "checkpoints/epoch_00001/state.json").write_text("1")
        (folder.path / "metrics.jsonl").write_text("a\n")
        folder.log.write_text("first\n")
        folder.push()
        assert (tmp_path / "sweep/trials/x=1,ab/checkpoints/epoch_00001/state.json").read_text() == "1"
        (folder.path / "metrics.jsonl").write_text("a\nb\n")
        (folder.path / "checkpoints/epoch_00001/state.json").unlink()
        (folder.path / "checkpoints/epoch_00001").rmdir()
        (folder.path / "checkpoints/epoch_00002").mkdir()
        (folder.path / "checkpoints/epoch_00002/state.json").write_text("2")
        folder.push()
    with storage.trial("x=1,ab") as folder:
        found = {
            str(path.relative_to(folder.path)): path.read_text() for path in folder.path.rglob("*") if path.is_file()
        }
        assert found == {"metrics.jsonl": "a\nb\n", "checkpoints/epoch_00002/state.json": "2"}
        assert not (folder.path / "checkpoints/epoch_00001/state.json").exists()
        assert folder.log.read_text() == "first\n"
        with folder.log.open("a") as log:
            log.write("second\n")
    assert (tmp_path / "sweep/logs/x=1,ab.log").read_text() == "first\nsecond\n"


def test_what_was_done_is_kept_when_a_trial_fails(storage: Storage, tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with storage.trial("t") as folder:
            folder.path.mkdir(parents=True)
            (folder.path / "metrics.jsonl").write_text("a\n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert (tmp_path / "sweep/trials/t/metrics.jsonl").read_text() == "a\n"


def test_only_what_has_changed_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    original = RemoteStorage.send

    def send(self: RemoteStorage, source: Path, name: str) -> None:
        sent.append(name)
        original(self, source, name)

    monkeypatch.setattr(RemoteStorage, "send", send)
    with Storage.at(f"file://{tmp_path}/s").trial("t") as folder:
        folder.path.mkdir(parents=True)
        (folder.path / "large").write_bytes(b"0" * 1000)
        folder.push()
        (folder.path / "small").write_text("1")
        folder.push()
        folder.push()
    assert sent == ["trials/t/large", "trials/t/small"]


def test_a_run_directory_is_copied_for_a_rank_elsewhere(tmp_path: Path) -> None:
    remote, local = Storage.at(f"file://{tmp_path}/s"), Storage.at(str(tmp_path / "s"))
    remote.write("trials/t/checkpoints/epoch_00001/state.json", json.dumps(1).encode())
    assert remote.copy("t", tmp_path / "copy") is True
    assert (tmp_path / "copy/checkpoints/epoch_00001/state.json").read_text() == "1"
    assert local.copy("t", tmp_path / "s/trials/t") is False, "a shared folder is there already"


def test_places_that_cannot_be_used_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--storage nowhere://x cannot be used"):
        Storage.at("nowhere://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Storage.at(str(tmp_path / "file")).is_empty()
