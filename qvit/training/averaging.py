"""Gradients averaged over processes, all in one exchange after the backward pass.

A step of the models this package is for takes tens of milliseconds on a GPU and their gradients are below 350 MB, a
millisecond or two over NVLink, so hooks that exchange during the backward pass would gain little; and they do not go into a
CUDA graph (`qvit.training.graphed`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed
from torch import nn


def average_gradients(parameters: Iterable[nn.Parameter], processes: int) -> None:
    """Replaces every gradient by its mean over all processes, in place; each process must have the same gradients set."""
    if processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= processes
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
