"""What every test may ask for: a device, and the same random numbers each time."""

from pathlib import Path

import pytest
import torch

# On tensors this small, threads cost far more than they give, most of all on a busy machine.
torch.set_num_threads(1)

requires_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


# Few tests that take minutes, as they start clusters and processes. Begun last, they would leave one worker of
# pytest-xdist alone with them (`make test` lets it keep this order).
LONGEST = ("tune", "cluster", "test_processes.py", "test_faults.py", "test_trainer.py", "test_resume.py", "test_cli.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of `LONGEST` first."""
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        first = item.path.relative_to(here).parts[0]
        return LONGEST.index(first) if first in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=requires_cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The test runs on the CPU, and on a GPU where there is one, there with float32 that is float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
