"""CUDA graphs on the CPU: what is recorded is a list of operations on fixed tensors, run again by a replay.

As on a GPU, a recording changes nothing, a replay reads and writes the memory that was recorded, and what would wait
for the device or depend on values cannot be recorded. Copies from the host, which cannot either, are not told apart.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
RUNNING_STATISTICS = slice(3, 5)  # of native_batch_norm, which its schema does not call written
UNRECORDABLE = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.bincount}


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for operation, args, kwargs, results in self.operations:
            for recorded, new in zip(tree_leaves(results), tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(recorded, Tensor):
                    recorded.copy_(new)


class _Recording(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.made: set[int] = set()
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operation.overloadpacket in UNRECORDABLE:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation}")
        for tensor in self._written(operation, args):
            if tensor.untyped_storage().data_ptr() not in self.made:
                self.before.append((tensor, tensor.clone()))
        results = operation(*args, **kwargs)
        self.made |= {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(results) if isinstance(leaf, Tensor)}
        self.graph.operations.append((operation, args, kwargs, results))
        return results

    def _written(self, operation: Any, args: Any) -> list[Tensor]:
        if operation.overloadpacket == aten.native_batch_norm:
            return [tensor for tensor in args[RUNNING_STATISTICS] if tensor is not None]
        arguments = zip(operation._schema.arguments, args, strict=False)
        written = [value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write]
        return tree_leaves(written)


@contextmanager
def _record(graph: Graph, capture_error_mode: str) -> Iterator[None]:
    """In place of torch.cuda.graph."""
    assert capture_error_mode == "thread_local"
    with _Recording(graph) as recording:
        yield
    for tensor, value in reversed(recording.before):
        with torch.no_grad():
            tensor.copy_(value)


class _Stream:
    def wait_stream(self, other: "_Stream") -> None:
        pass


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that are made in the test, all of them emulated."""
    made: list[Graph] = []

    def graph() -> Graph:
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", _record)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return made
