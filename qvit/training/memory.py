"""Which batch would have fitted, where a step ran out of memory.

How far a failed step got says little about what it needed, so a small batch is run once more and its peak is scaled up. On a
CPU, where nothing tells the peak, halves of the batch are run until one fits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_USABLE = 0.93  # of the memory; the rest is lost to fragments and to the libraries' workspaces
_PROBED = 8  # the batch that is tried is this part of the one that failed


def is_full(error: BaseException) -> bool:
    """Whether the error says that memory is full: the GPU's (`torch.OutOfMemoryError`), or the machine's."""
    host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return host or isinstance(error, (torch.OutOfMemoryError, MemoryError))


class DeviceMemory:
    """What PyTorch knows of a GPU's memory, in bytes."""

    def capacity(self) -> int:
        """What this process could allocate in all: what is free and what it holds."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()

    def start(self) -> int:
        """What is allocated now; the peak counts from here on."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """The most that was allocated since `start`."""
        return torch.cuda.max_memory_allocated()


def fitting_batch(
    batch: int, probe: Callable[[int], None], model: torch.nn.Module, states: int, memory: DeviceMemory
) -> int | None:
    """The largest batch that should fit, smaller than ``batch``: a multiple of 8, or 1, 2 or 4; ``None`` if none does.

    Args:
        batch: images of the step that failed; nothing of it may be in memory any more.
        probe: runs forward and backward on that many images and keeps nothing.
        model: that is trained.
        states: tensors the size of the model that a step needs beside it and that are not there yet: its gradients, and an
            optimizer's state before the first step.
        memory: of the device.
    """
    tried = max(batch // _PROBED, 1)
    before = memory.start()
    try:
        probe(tried)
    except torch.OutOfMemoryError:
        return None
    an_image = max(memory.peak() - before, 1) / tried
    fixed = before + states * sum(p.numel() * p.element_size() for p in model.parameters())
    return rounded(min(int((memory.capacity() * _USABLE - fixed) / an_image), batch - 1))


def fitting_half(batch: int, probe: Callable[[int], None]) -> int | None:
    """The first of a half, a quarter, .. of a ``batch`` that fits on a CPU, rounded as `fitting_batch`; else ``None``.

    Args:
        batch: images of the step that failed.
        probe: runs forward and backward on that many images and keeps nothing.
    """
    while (smaller := rounded(batch // 2)) is not None:
        batch = smaller
        try:
            probe(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_full(error):
                raise
        else:
            return batch
    return None


def rounded(images: int) -> int | None:
    """Down to a multiple of 8 or, below 8, to a power of two; ``None`` below 1."""
    if images < 1:
        return None
    return images // 8 * 8 if images >= 8 else 1 << (images.bit_length() - 1)
