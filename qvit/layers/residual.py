"""The residual stream of a student in float16: where `qvit.integer.ops.Block` rounds it, so does the training graph.

The rounded stream goes on in the type it had, in which every float16 number of it has an exact place. Gradients pass as if
nothing had been rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import nn

_EXPONENT = 0x7F800000  # the bits of a float32 that hold it
_SMALLEST_NORMAL = 2.0**-14
_OVERFLOW = 65520.0  # halfway from the largest float16 to the next power of two


def to_half(x: torch.Tensor) -> torch.Tensor:
    """x, first as float32, to the nearest float16, ties to even; in the type of x.

    ``torch.compile`` takes a cast to float16 and back for none. Compiled code therefore adds, and takes away again, the power
    of two whose last place is float16's: float32 sums are rounded as float16 is.
    """
    if not torch.compiler.is_compiling():
        return x.float().half().to(x.dtype)
    # No cast to the type that there is: behind one, compiled by torch 2.11, `_Rounded` has a gradient of zero.
    rounded = rounded_by_sums(x if x.dtype == torch.float32 else x.float())
    return rounded if x.dtype == torch.float32 else rounded.to(x.dtype)


def rounded_by_sums(x: torch.Tensor) -> torch.Tensor:
    """float32 -> the nearest float16, as float32, with sums of float32 alone."""
    power = (x.view(torch.int32) & _EXPONENT).view(torch.float32)  # the largest power of two that is not above |x|
    shift = power.clamp_min(_SMALLEST_NORMAL) * 8192.0  # |x| + shift has 13 places less than |x|
    rounded = ((x.abs() + shift) - shift).copysign(x)
    return torch.where(x.abs() < _OVERFLOW, rounded, x * torch.inf)


class _Rounded(torch.autograd.Function):
    """`to_half`, straight through."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return to_half(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


def half_stream(x: torch.Tensor) -> torch.Tensor:
    """The residual stream [.., C] rounded to float16, in the type of x; the gradient passes unchanged."""
    return _Rounded.apply(x)  # type: ignore[no-untyped-call]


class HalfBlock(Block):
    """timm's block of a ViT with both of its sums rounded."""

    def forward(self, x: torch.Tensor, **masks: Any) -> torch.Tensor:  # type: ignore[override]
        x = half_stream(x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **masks))))
        return half_stream(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


class HalfSwinBlock(SwinTransformerBlock):
    """timm's block of a Swin Transformer with both of its sums rounded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = half_stream(x + self.drop_path1(self._attn(self.norm1(x))))
        tokens = x.flatten(1, 2)
        return half_stream(tokens + self.drop_path2(self.mlp(self.norm2(tokens)))).view_as(x)


_HALF: dict[type, type] = {Block: HalfBlock, SwinTransformerBlock: HalfSwinBlock}


def round_block(block: nn.Module) -> None:
    """Gives a block of timm, in place, its form with rounded sums; its parameters stay what and where they are."""
    block.__class__ = _HALF[type(block)]


def round_output(module: nn.Module) -> None:
    """Rounds what a module gives, from now on, where that is the residual stream."""
    module.register_forward_hook(_rounded_output)


def _rounded_output(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return half_stream(output)
