"""A training step's forward and backward pass as one CUDA graph: launched at once instead of kernel by kernel.

A low-bit step consists of thousands of small kernels; Python takes longer to launch them than a GPU to run them. Shapes do not
change from step to step, so the passes are recorded once, after a few steps that ran as usual, and replayed from then on.
What a step reads must not be new tensors, then: its inputs are copied into those of the recording, and gradients lie where
they lay. Random numbers stay those of the seed that was set before a replay.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import nn

from qvit.errors import TrainingError

# Kernels are compiled and libraries choose their algorithms in the first steps, which a recording cannot.
_STEPS_BEFORE = 3


class GraphedBackward:
    """Calls ``compute`` as it is, or from the fourth time on as a CUDA graph.

    Args:
        compute: tensors in, tensors out; leaves gradients in the parameters, and reads and writes nothing else that changes
            from step to step and is no tensor.
        parameters: that get gradients.
        enabled: if false, ``compute`` is always called as it is.
    """

    def __init__(self, compute: Callable[..., Any], parameters: Iterable[nn.Parameter], enabled: bool) -> None:
        self.compute, self.parameters, self.enabled = compute, list(parameters), enabled
        self._key: Hashable = None
        self._forget()

    def _forget(self) -> None:
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[torch.Tensor | None] = []
        self._outputs: Any = None

    def __call__(self, *inputs: torch.Tensor | None, key: Hashable = None) -> Any:
        """What ``compute(*inputs)`` returns; it stays valid until the next call.

        Args:
            inputs: tensors, or ``None``; of the same shapes and types as long as ``key`` is the same, or it is recorded anew.
            key: what else decides what is computed.

        Raises:
            TrainingError: the passes cannot be recorded.
        """
        if not self.enabled:
            self._clear_gradients()
            return self.compute(*inputs)
        full_key = (key, *[None if x is None else (x.shape, x.dtype) for x in inputs])
        if full_key != self._key:
            self._forget()
            self._key = full_key
        if self._steps < _STEPS_BEFORE:
            self._steps += 1
            return self._beside(inputs)
        if self._graph is None:
            self._record(inputs)
        assert self._graph is not None
        for own, given in zip(self._inputs, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs

    def clear(self) -> None:
        """Drops gradients and recording, and the memory they hold."""
        self._forget()
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _beside(self, inputs: tuple[torch.Tensor | None, ...]) -> Any:
        """Runs on a stream of its own, as a recording does, so that nothing of autograd is tied to the default stream."""
        self._clear_gradients()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self.compute(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _record(self, inputs: tuple[torch.Tensor | None, ...]) -> None:
        self._clear_gradients()
        self._inputs = [None if x is None else x.clone() for x in inputs]
        torch.cuda.synchronize()
        # The graph keeps memory of its own: give back what the steps before it left cached.
        gc.collect()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that load images may call CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self.compute(*self._inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise TrainingError(
                f"The training step cannot be recorded as a CUDA graph ({reason}): set cuda_graph=false to run without."
            ) from error
        self._graph = graph
