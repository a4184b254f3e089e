import os
import socket
from pathlib import Path
from urllib.error import URLError

import pytest

from distributed_batchcam.data.sources import fetch_files, require_folder, resolve_root
from distributed_batchcam.errors import InputError


def test_root_is_the_argument_then_the_variable_then_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BATCHCAM_DATA", raising=False)
    assert resolve_root(None) == tmp_path / "data"
    assert not (tmp_path / "data").exists()
    (tmp_path / "variable").mkdir()
    (tmp_path / "argument").mkdir()
    monkeypatch.setenv("BATCHCAM_DATA", str(tmp_path / "variable"))
    assert resolve_root(None) == tmp_path / "variable"
    assert resolve_root("argument") == tmp_path / "argument"
    monkeypatch.setenv("BATCHCAM_DATA", "")
    assert resolve_root(None) == tmp_path / "data"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sets").mkdir()
    assert resolve_root("~/sets") == tmp_path / "sets"


def test_named_folder_must_exist(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no folder .*gone \(--data-root\)"):
        resolve_root(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"no folder .*file"):
        resolve_root(tmp_path / "file")
    monkeypatch.setenv("BATCHCAM_DATA", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"no folder .*gone \(\$BATCHCAM_DATA\)"):
        resolve_root(None)


def test_folder_that_cannot_be_downloaded_is_required(tmp_path):
    require_folder(tmp_path)
    with pytest.raises(InputError, match=r"no folder .*data; .*--data-root"):
        require_folder(tmp_path / "data")


def refuse(folder: Path) -> None:
    raise AssertionError("nothing is missing, so nothing is to be fetched")


def test_nothing_is_fetched_where_nothing_is_missing(tmp_path, capsys):
    fetch_files("set", tmp_path / "data", [], refuse)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_missing_files_are_put_in_place_and_others_left_alone(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mine").write_text("mine")

    def fetch(folder: Path) -> None:
        assert socket.getdefaulttimeout() is not None
        (folder / "raw").mkdir()
        for name in ("mine", "lost", "by-product"):
            (folder / "raw" / name).write_text("theirs")

    fetch_files("set", tmp_path, ["raw/lost"], fetch)
    assert (tmp_path / "raw" / "mine").read_text() == "mine"
    assert (tmp_path / "raw" / "lost").read_text() == "theirs"
    assert sorted(os.listdir(tmp_path / "raw")) == ["lost", "mine"]
    assert os.listdir(tmp_path) == ["raw"]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "raw/lost" in told[0]
    assert socket.getdefaulttimeout() is None


def fail(folder: Path) -> None:
    (folder / "half").write_text("half")
    raise URLError("no\nnetwork")


def bring_half(folder: Path) -> None:
    (folder / "found").touch()


@pytest.mark.parametrize("fetch", [fail, bring_half])
@pytest.mark.parametrize("name", ["there", "not there"])
def test_failed_download_leaves_nothing_behind(tmp_path, name, fetch):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=r"set: found, lost not found in .*there.*--data-root") as caught:
        fetch_files("set", tmp_path / name, ["found", "lost"], fetch)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["there"]
    assert os.listdir(tmp_path / "there") == []


def test_folder_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="download failed"):
        fetch_files("set", tmp_path / "file", ["lost"], refuse)
