"""Forward passes of one batch size: the launches of a plan, most of them recorded as a CUDA graph where there is a GPU."""

from __future__ import annotations

from typing import Any

import torch

from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.device import Device, Queue
from qvit.engines.cuda.plan import Plan

_AHEAD = 4  # launches outside of the graph, with which the GPU begins while the graph is on its way


class Replay:
    """Runs a plan again and again, with as little work on the CPU as there can be; made and run within the device's `current`.

    The images lie elsewhere every time, and so do the logits, which are the caller's to keep: the first launch and the last one
    have their addresses changed and stay outside of the graph. So do some behind the first: to queue a graph takes the CPU
    longer than to queue a few launches, and the GPU would have nothing to do.

    Args:
        plan: the launches.
        gpu: where they run.
        overlap: whether a launch may begin before the one before it has ended.

    Attributes:
        plan: as given.
    """

    def __init__(self, plan: Plan, gpu: Device, overlap: bool) -> None:
        self.plan = plan
        self._gpu, self._overlap = gpu, overlap
        self._first: dict[torch.dtype, tuple[Launch, Queue]] = {}
        *steps, self._last = (step.launch for step in plan.steps)
        assert self._last.values["out"] is plan.logits
        gpu.compile([*steps, self._last])
        recorded = gpu.device.type == "cuda"
        self._steps = steps[_AHEAD:] if recorded else []
        self._ahead = [gpu.prepared(launch, overlap) for launch in (steps[:_AHEAD] if recorded else steps)]
        self._end = gpu.prepared(self._last, False)
        self._graph = self._recorded() if self._steps else None

    def run(self, images: torch.Tensor) -> torch.Tensor:
        """Images [batch, C, H, W] on the device, uint8 or float32, contiguous -> logits [batch, classes], float32."""
        found = self._first.get(images.dtype)
        if found is None:
            launch = self.plan.pixels(images[:0])  # keeps no images
            found = self._first[images.dtype] = launch, self._gpu.prepared(launch, False)
        first, begin = found
        first.packed.images = images.data_ptr()
        stream = self._gpu.stream
        begin(stream)
        for queue in self._ahead:
            queue(stream)
        if self._graph is not None:
            self._graph.replay()
        logits = torch.empty_like(self.plan.logits)
        self._last.packed.out = logits.data_ptr()
        self._end(stream)
        return logits

    def _recorded(self) -> Any:
        """The launches in between as a CUDA graph; run once before, so that all code is loaded."""
        device = self._gpu.device
        queues = [self._gpu.prepared(launch, self._overlap and i > 0) for i, launch in enumerate(self._steps)]

        def run() -> None:
            stream = self._gpu.stream
            for queue in queues:
                queue(stream)

        run()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # On a stream of this GPU: PyTorch's own for recording is of the GPU that recorded first.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
            run()
        return graph
