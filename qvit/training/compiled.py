"""A training step's transformer blocks through ``torch.compile``: LayerNorm, GELU, residuals and casts fused between the matrix
products.

Each block is compiled by itself ("regional compilation"): blocks of one class and shape share the compiled code, so a ViT takes
the time of one block, a Swin Transformer that of one for each of its shapes. Nothing is renamed in the state dict, and nothing
is left in the model afterwards. Only steps run what was compiled: their shapes never change. Evaluation, whose last batch has
any size and which must equal the integer engines, runs the plain modules.

What has kernels of its own (`QuantAttention`, `QuantMlp`) and a teacher's attention whose q and k are tapped stay as they are:
in such a block, what lies between them is fused, and the forty small steps that lay out attention's scales for its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from qvit.errors import TrainingError
from qvit.layers.attention import QuantAttention
from qvit.layers.blocks import transformer_blocks
from qvit.layers.mlp import QuantMlp

# Variants of one class of block; PyTorch gives up after 8, and a Swin Transformer with stochastic depth has one a block.
_MOST_VARIANTS = 64


class CompiledBlocks:
    """Compiles the blocks of models, at the first call of each shape.

    Args:
        models: timm vision transformers, quantized or not; ``None`` is passed over.
        tapped: leave float attention as it is, since `qvit.distill.taps` reads inside it.
        enabled: if false, nothing is done at all.
    """

    def __init__(self, *models: nn.Module | None, tapped: bool = False, enabled: bool = True) -> None:
        given = [model for model in models if model is not None and enabled]
        self._blocks = [block for model in given for block in transformer_blocks(model)]
        self._opaque = [
            part
            for block in self._blocks
            for part in block.modules()
            if isinstance(part, (QuantAttention, QuantMlp)) or (tapped and _is_float_attention(part))
        ]
        self._running = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it `running` has an effect; attach after taps."""
        if not self._blocks:
            yield
            return
        import torch._dynamo  # takes a second, which only those wait who compile

        with ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=_MOST_VARIANTS))
            for part in self._opaque:
                stack.enter_context(_replaced(part, "forward", torch.compiler.disable(part.forward)))
                if isinstance(part, QuantAttention):
                    stack.enter_context(_replaced(part, "columns", self._either(part.columns)))
            for block in self._blocks:
                stack.enter_context(_replaced(block, "forward", self._either(block.forward)))
            yield

    def _either(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(plain, dynamic=False)

        def either(*args: Any, **kwargs: Any) -> Any:
            return (compiled if self._running else plain)(*args, **kwargs)

        return either

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it blocks run compiled; elsewhere, as they are.

        Raises:
            TrainingError: PyTorch cannot compile them here.
        """
        if not self._blocks:
            yield
            return
        from torch._dynamo.exc import TorchDynamoException

        self._running = True
        try:
            yield
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).strip().partition("\n")[0].rstrip(".")
            raise TrainingError(
                f"The blocks cannot be compiled here ({reason}): set compile=false, or install a C++ compiler."
            ) from None
        finally:
            self._running = False


def _is_float_attention(part: Any) -> bool:
    return isinstance(getattr(part, "qkv", None), nn.Linear) and hasattr(part, "num_heads")


@contextmanager
def _replaced(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Within it the module has another method of this name; a ``forward`` lies under all of the module's hooks."""
    before = module.__dict__.get(name)
    setattr(module, name, method)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)
