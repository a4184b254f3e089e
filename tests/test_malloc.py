"""The process keeps what it frees, where the C library is glibc."""

import ctypes
import platform
import subprocess
import sys

import pytest

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


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
