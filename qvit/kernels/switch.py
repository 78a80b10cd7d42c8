"""When the fused kernels run."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_enabled = False


@contextmanager
def fused(enabled: bool = True) -> Iterator[None]:
    """Within it, layers that have a fused kernel run it; global, not thread-local, since backward has its own thread."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def active(x: torch.Tensor) -> bool:
    """Whether the fused kernels stand in for the plain modules on ``x``'s device, now."""
    return _enabled and runnable(x.device)


def runnable(device: torch.device) -> bool:
    """Whether Triton runs there: on a GPU, or anywhere under its interpreter (``TRITON_INTERPRET=1``)."""
    return _has_triton() and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def training_dtype(device: torch.device) -> torch.dtype:
    """The type that operands of matrix products have: the autocast type, float32 without autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
