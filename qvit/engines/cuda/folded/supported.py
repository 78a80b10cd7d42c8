"""What the kernels know of what a model may do."""

from __future__ import annotations

from qvit.errors import UnsupportedModelError
from qvit.integer import ops
from qvit.integer.model import IntegerModel
from qvit.spec import PerGroup, PerToken

HEAD_DIMS = (32, 64)
MOST_WINDOW_TOKENS = 576  # every GPU's shared memory holds the keys and values of one head of such a window


def check(model: IntegerModel) -> None:
    """Raises `UnsupportedModelError` where the kernels do not know what the model does; the message names it."""

    def refuse(what: str) -> None:
        raise UnsupportedModelError(f"The CUDA engine does not run {what} yet: use engine='reference' on device='cuda'.")

    for layer in model.linears():
        for what, spec in (("input", layer.input.spec), ("weight", layer.weight.spec)):
            if isinstance(spec.scale, (PerToken, PerGroup)):
                refuse(f"{layer.name}.{what}'s scale per {'token' if isinstance(spec.scale, PerToken) else 'group'}")
        if layer.weight.half_step and layer.weight.spec.bits == 8:
            refuse(f"{layer.name}.weight, 8 bits at odd half steps")
    for block in model.blocks:
        attention = block.attention
        if attention.head_dim not in HEAD_DIMS:
            refuse(f"heads of {attention.head_dim} channels, only of {' or '.join(map(str, HEAD_DIMS))}")
        if attention.windows is not None and attention.windows.area > MOST_WINDOW_TOKENS:
            refuse(f"windows of {attention.windows.area} tokens, only of {MOST_WINDOW_TOKENS} at most")
        for what in ("q", "k", "v", "map"):
            quantizer: ops.Quantizer = getattr(attention, what)
            if isinstance(quantizer.spec.scale, PerToken):
                refuse(f"{block.name}.attn.{what}'s scale per token")
            if what in ("q", "k") and quantizer.spec.qp > 127:
                refuse(f"{block.name}.attn.{what}, unsigned at 8 bits")
        if attention.q.spec.learns_offset:
            refuse(f"{block.name}.attn.q's learned offset")
