"""Elementwise code that `torch.compile` fuses into one kernel where speed counts and rounding does not.

A chain of elementwise operations moves a tensor through memory once an operation; fused, once in all. Fused arithmetic may
round differently in the last bit, so it is on in training steps only (`fused`): evaluation runs the plain functions, which are
what the integer engines reproduce bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

# One specialisation a shape; a vision transformer has a dozen or two.
_SPECIALISATIONS = 64
_enabled = False


@contextmanager
def fused(enabled: bool = True) -> Iterator[None]:
    """Within it, `fusible` functions run compiled; global, not thread-local, since autograd's backward has its own thread."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def fusible(function: _Function) -> _Function:
    """Marks an elementwise function of tensors (reductions included) as one that may run compiled."""
    compiled: Any = None

    @wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal compiled
        if not _enabled:
            return function(*arguments)
        if compiled is None:
            compiled = torch.compile(function, dynamic=False)
        # Set here and not once: PyTorch keeps its settings a thread, and backward runs in another one than forward.
        config = torch._dynamo.config
        if config.recompile_limit < _SPECIALISATIONS:
            config.recompile_limit = _SPECIALISATIONS
        return compiled(*arguments)

    return call  # type: ignore[return-value]
