"""What every test may ask for: a device, a Ray, and the same random numbers each time."""

import os
from collections.abc import Iterator

import pytest
import torch
from emulated_cuda_graph import graphs as graphs  # a fixture

# On tensors this small, threads cost far more than they give, most of all on a busy machine.
torch.set_num_threads(1)
# Ray starts its workers at a low priority: beside other tests on two cores, trials would all but stand still.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - the name that Ray reads

requires_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=requires_cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The test runs on the CPU, and on a GPU where there is one, there with float32 that is float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def two_cpus() -> Iterator[None]:
    """A Ray of two logical CPUs, which all sweeps in this process join."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
