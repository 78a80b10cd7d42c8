"""A small vision transformer starts with an even choice of a larger one's weights.

Everywhere the same channels of the residual stream are kept, so that what one layer writes the next still reads; of the
attention whole heads, and within them, where heads differ in width, the same channels of q, k and v.

Source: Xu et al., "Initializing Models with Larger Ones", ICLR 2024 (weight selection); they choose evenly among the channels
of all heads, and take the first blocks where these are blocks at the same share of the depth.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import nn

from qvit.distill.layout import matched_blocks
from qvit.errors import RecipeError

_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_HINT = "name a larger ViT as the teacher, or set distill.start_from_teacher=false"


@torch.no_grad()
def select_weights(student: Any, teacher: Any) -> None:
    """Overwrites the parameters of ``student`` with chosen ones of ``teacher``; patch and position embedding are resampled.

    Args:
        student, teacher: float timm vision transformers of the same parts, the teacher at least as large in width, depth,
            heads and their width; patches and images may differ in size.

    Raises:
        RecipeError: the student cannot be cut out of the teacher.
    """
    for who, model in (("student", student), ("teacher", teacher)):
        if not hasattr(model, "blocks") or not hasattr(model, "num_prefix_tokens"):
            raise RecipeError(f"The {who} ({type(model).__name__}) is no ViT, whose weights could be chosen from: {_HINT}.")
    state = {name: tensor.detach().cpu() for name, tensor in teacher.state_dict().items()}
    if "patch_embed.proj.weight" in state:
        size = list(student.patch_embed.patch_size)
        state["patch_embed.proj.weight"] = resample_patch_embed(state["patch_embed.proj.weight"].float(), size)
    if state.get("pos_embed") is not None:
        grids = list(student.patch_embed.grid_size), list(teacher.patch_embed.grid_size)
        prefix = state["pos_embed"].shape[1] - grids[1][0] * grids[1][1]
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"].float(), *grids, num_prefix_tokens=prefix)
    blocks = dict(matched_blocks(len(student.blocks), len(teacher.blocks), "all"))
    inner = _heads(student, teacher)
    chosen = {}
    for name, own in student.state_dict().items():
        source = _BLOCK.sub(lambda match: f"blocks.{blocks[int(match[1])]}.", name)
        tensor = state.get(source)
        if tensor is None or tensor.ndim != own.ndim or any(n < k for n, k in zip(tensor.shape, own.shape, strict=True)):
            raise RecipeError(f"The teacher's {source} is missing or too small for the student's {name}: {_HINT}.")
        for axis, (n, k) in enumerate(zip(tensor.shape, own.shape, strict=True)):
            if ".attn.qkv." in name and axis == 0:
                index = torch.cat([inner + part * (n // 3) for part in range(3)])
            elif name.endswith(".attn.proj.weight") and axis == 1:
                index = inner
            else:
                index = _even(n, k)
            tensor = tensor.index_select(axis, index)
        chosen[name] = tensor
    student.load_state_dict(chosen)


def _even(there: int, wanted: int) -> torch.Tensor:
    """``wanted`` of ``there`` indices, int64, at equal distances."""
    return torch.arange(wanted) * there // wanted


def _heads(student: Any, teacher: Any) -> torch.Tensor:
    """The teacher's channels, of q, k or v of all heads side by side, that become the student's."""
    own, other = student.blocks[0].attn, teacher.blocks[0].attn
    sizes = [(_width(attention), attention.num_heads) for attention in (own, other)]
    (width, heads), (other_width, other_heads) = sizes
    if width > other_width or heads > other_heads:
        raise RecipeError(
            f"The teacher has {other_heads} heads {other_width} wide and the student {heads} {width} wide, which cannot be "
            f"chosen from them: {_HINT}."
        )
    return (_even(other_heads, heads)[:, None] * other_width + _even(other_width, width)).flatten()


def _width(attention: nn.Module) -> int:
    return attention.head_dim  # type: ignore[return-value]
