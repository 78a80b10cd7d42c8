"""Forward passes of one batch size: the launches of a plan, recorded as a CUDA graph where there is a GPU."""

from __future__ import annotations

from typing import Any

import torch

from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.device import Device
from qvit.engines.cuda.plan import Plan


class Replay:
    """Runs a plan again and again, with as little work on the CPU as there can be.

    The images lie elsewhere every time, and so do the logits, which are the caller's to keep: the first launch and the last one
    have their addresses changed and stay outside of the graph.

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
        self._first: dict[torch.dtype, Launch] = {}
        *self._steps, self._last = (step.launch for step in plan.steps)
        assert self._last.values["out"] is plan.logits
        self._graph = self._recorded() if gpu.device.type == "cuda" else None

    def run(self, images: torch.Tensor) -> torch.Tensor:
        """Images [batch, C, H, W] on the device, uint8 or float32, contiguous -> logits [batch, classes], float32."""
        first = self._first.get(images.dtype)
        if first is None:
            first = self._first[images.dtype] = self.plan.pixels(images[:0])  # keeps no images
        first.packed.images = images.data_ptr()
        self._gpu.launch(first)
        if self._graph is None:
            self._queue()
        else:
            self._graph.replay()
        logits = torch.empty_like(self.plan.logits)
        self._last.packed.out = logits.data_ptr()
        self._gpu.launch(self._last)
        return logits

    def _queue(self) -> None:
        behind = False
        for launch in self._steps:
            self._gpu.launch(launch, behind)
            behind = self._overlap

    def _recorded(self) -> Any:
        """The launches in between as a CUDA graph; compiles them first."""
        device = self._gpu.device
        with torch.cuda.device(device):
            self._queue()
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._queue()
        return graph
