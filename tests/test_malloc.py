"""The process keeps what it frees, where the C library is glibc."""

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment

from distributed_batchcam.malloc import keep_freed_memory

ON_GLIBC = platform.libc_ver()[0] == "glibc"

# Allocates and frees 64 MiB twenty times, and prints how many pages had to be fetched from the system meanwhile.
FAULTS = """
import resource, sys
from distributed_batchcam.malloc import keep_freed_memory
keep_freed_memory(sys.argv[1] == "keep")
size = 64 << 20
bytearray(size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    bytearray(size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not ON_GLIBC, reason="the C library is not glibc")
def test_freed_memory_is_not_fetched_again() -> None:
    def faults(keep: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, keep], capture_output=True, check=True).stdout)

    assert faults("keep") < 1000 < faults("let go")


# Trains for a moment, and prints how far large tensors are off the page that torch puts them at for huge pages. They
# are held together: one after the other they could all get the same place, on a page by chance.
ALIGNMENT = """
import sys
from distributed_batchcam.cli import run
options = "--dataset digits --image-size 8 --epochs 1 --batch-size 256 --device cpu --out"
assert run(["train", *options.split(), sys.argv[1]]) == 0
import torch
tensors = [torch.zeros(4 << 20) for _ in range(5)]
print(*(tensor.data_ptr() % 4096 for tensor in tensors), sep=",")
"""


@pytest.mark.parametrize("setting", [None, "0"])
def test_a_run_puts_its_large_tensors_in_huge_pages_unless_told_otherwise(setting: str | None, tmp_path: Path) -> None:
    variables = environment(**({} if setting is None else {"THP_MEM_ALLOC_ENABLE": setting}))
    command = [sys.executable, "-c", ALIGNMENT, str(tmp_path / "run")]
    printed = subprocess.run(command, capture_output=True, check=True, text=True, env=variables).stdout
    offsets = set(map(int, printed.splitlines()[-1].split(",")))
    assert (offsets == {0}) == (setting is None)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
