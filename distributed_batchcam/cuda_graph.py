"""Forward, loss and backward of a training step as one CUDA graph: recorded once, replayed with every further batch.

What a small network's step waits for on a GPU is the launch of its operations, one by one, from Python. A graph is
launched whole. torch.cuda.graph does the work; here is what makes it a part of a training.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Output = TypeVar("Output")

WARM_UP = 3
"""Calls before the recording: cuDNN chooses its algorithms in them, and constants reach the device."""


class GraphedPass(Generic[Output]):
    """`function`, which runs forward and backward, called as it is at first, and replayed from a CUDA graph afterwards.

    Every call leaves in `.grad` of the parameters the gradients of that call alone: they do not add up. What a call
    returns is overwritten by the next one.

    Args:
        function: of tensors that keep their shapes; nothing in it may wait for the device, nor depend on values.
        parameters: whose gradients it computes.
    """

    def __init__(self, function: Callable[..., Output], parameters: Sequence[nn.Parameter]) -> None:
        self._function = function
        self._parameters = parameters
        self._warm_up_left = WARM_UP
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        self._output: Output

    def __call__(self, *inputs: Tensor) -> Output:
        """The function's output for these inputs.

        Raises:
            ValueError: shapes or types differ from those that were recorded.
        """
        if self._warm_up_left:
            self._warm_up_left -= 1
            return self._warm_up(inputs)
        if self._graph is None:
            self._graph = self._record(inputs)
        for recorded, given in zip(self._inputs, inputs, strict=True):
            if (recorded.shape, recorded.dtype) != (given.shape, given.dtype):
                raise ValueError(f"recorded with {recorded.shape} {recorded.dtype}, got {given.shape} {given.dtype}")
            recorded.copy_(given)
        self._graph.replay()
        # The optimizer's zero_grad lets go of them.
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._output

    def _warm_up(self, inputs: tuple[Tensor, ...]) -> Output:
        """On a stream of its own, as recording is."""
        self._forget_gradients()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            output = self._function(*inputs)
        current.wait_stream(side)
        return output

    def _record(self, inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        # Gradients that are there would be added to; without any, the graph has its own, in the same place every time.
        self._forget_gradients()
        self._inputs = [given.clone() for given in inputs]
        graph = torch.cuda.CUDAGraph()
        # Of this thread: those that save checkpoints and pin memory may call CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._output = self._function(*self._inputs)
        self._gradients = [parameter.grad for parameter in self._parameters]
        return graph

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
