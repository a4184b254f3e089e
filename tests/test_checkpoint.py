"""Checkpoints: exact round trips, and nothing damaged is ever taken for whole."""

import hashlib
import subprocess
from pathlib import Path

import pytest
import torch

from distributed_batchcam.checkpoint import (
    STATE,
    SUMS,
    TENSORS,
    load_checkpoint,
    load_run,
    pack,
    write_atomic,
    write_checkpoint,
)
from distributed_batchcam.errors import InputError


def trained_state() -> dict[str, object]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    for _ in range(3):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "progress": {"epoch": 3, "best": 97.123456789012345, "note": None, "flags": [True, False]},
    }


def assert_same(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert isinstance(b, list)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_optimizer_and_scheduler_states_come_back_exactly(tmp_path: Path) -> None:
    state = trained_state()
    assert_same(state, load_checkpoint(write_checkpoint(tmp_path, "epoch_1", pack(state))))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_1"]


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "epoch_1", pack(trained_state()))
    assert sorted(file.name for file in path.iterdir()) == sorted([STATE, SUMS, TENSORS])
    assert all(b"torch._utils" not in file.read_bytes() for file in path.iterdir())


@pytest.mark.parametrize("name", [STATE, SUMS, TENSORS])
@pytest.mark.parametrize("position", [0, 7, 8, 100, -1])
def test_a_flipped_bit_in_any_file_is_noticed(tmp_path: Path, position: int, name: str) -> None:
    path = write_checkpoint(tmp_path, "epoch_1", pack(trained_state()))
    content = bytearray((path / name).read_bytes())
    content[position] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"epoch_1.*damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", [STATE, SUMS, TENSORS])
def test_a_cut_off_or_missing_file_is_noticed(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path, "epoch_1", pack(trained_state()))
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="epoch_1"):
        load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(InputError, match="epoch_1"):
        load_checkpoint(path)


def test_what_cannot_be_saved_as_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="/model/hook"):
        pack({"model": {"hook": print}})


def test_sha256sum_checks_a_checkpoint_by_hand(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "epoch_1", pack(trained_state()))
    checked = subprocess.run(["sha256sum", "-c", SUMS], cwd=path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_a_packed_state_is_a_copy(tmp_path: Path) -> None:
    weight = torch.zeros(3)
    packed = pack({"weight": weight})
    weight += 1
    assert load_checkpoint(write_checkpoint(tmp_path, "epoch_1", packed))["weight"].tolist() == [0, 0, 0]


def test_a_twin_in_the_way_is_replaced_and_kept_if_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "epoch_1", pack({"value": 1}))
    path = write_checkpoint(tmp_path, "epoch_1", pack({"value": 2}))
    assert load_checkpoint(path) == {"value": 2}
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, "epoch_1", pack({"value": 3}))
    assert load_checkpoint(path) == {"value": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["epoch_1"]


def test_a_checkpoint_of_endless_brackets_is_one_line(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "epoch_1", pack({"value": 1}))
    content = b"[" * 100_000
    (path / STATE).write_bytes(content)
    sums = (path / SUMS).read_text().splitlines()
    (path / SUMS).write_text(f"{sums[0]}\n{hashlib.sha256(content).hexdigest()}  {STATE}\n")
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run directory: it has no config\.yaml"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("epochs: 1\n")
    with pytest.raises(InputError, match="unfinished run"):
        load_run(tmp_path)
