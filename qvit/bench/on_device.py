"""Calls on a GPU as they are measured: images that lie there already, and a call ends when the GPU has its result.

Everything works on the device ``cpu`` too, which has nothing to wait for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

_CALLS_TO_SETTLE = 2  # torch.compile's CUDA graphs: the first call compiles, the second records, the third replays


def random_images(shape: Sequence[int], dtype: str, device: torch.device) -> torch.Tensor:
    """Noise [B, C, H, W] on the device: uint8 pixels, or floats of variance one."""
    rng = np.random.default_rng(0)
    if dtype == "uint8":
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)).to(device)
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(device, getattr(torch, dtype))


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device, calls: int = 10, rounds: int = 5) -> float:
    """How long a call takes the device, by its own clock: median over rounds of the mean of calls one after another.

    A call is made once before; the host must queue calls faster than the device does them.
    """
    call()
    times = []
    for _ in range(rounds):
        synchronize(device)
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(device):
                start.record()
                for _ in range(calls):
                    call()
                end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / calls)
        else:
            before = time.perf_counter()
            for _ in range(calls):
                call()
            times.append(1e3 * (time.perf_counter() - before) / calls)
    return median(times)


class DeviceCalls:
    """The same images again and again.

    Args:
        predict: images [B, C, H, W] -> logits [B, classes], tensors on the device.
        images: what it is called with.
    """

    def __init__(self, predict: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> None:
        self._predict, self._images = predict, images
        self._device = images.device

    def __call__(self) -> torch.Tensor:
        """Logits, when they are there."""
        logits = self._predict(self._images)
        synchronize(self._device)
        return logits

    def array(self) -> np.ndarray:
        """Logits of one call, float32."""
        return self().float().cpu().numpy()

    def settle(self) -> None:
        """Calls until nothing is compiled or recorded any more, and forgets what memory that took."""
        for _ in range(_CALLS_TO_SETTLE):
            self()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def facts(self) -> dict[str, Any]:
        """``device``, its name, and ``gpu_mb``: the most of its memory that PyTorch's allocator has had since `settle`.

        In MB of 2^20 bytes (``torch.cuda.max_memory_reserved``): weights, buffers and recorded graphs, not CUDA's own context.
        """
        if self._device.type != "cuda":
            return {"device": self._device.type}
        return {
            "device": torch.cuda.get_device_name(self._device),
            "gpu_mb": torch.cuda.max_memory_reserved(self._device) / 2**20,
        }
