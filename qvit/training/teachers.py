"""Whether a teacher fits a student, asked before training starts."""

from __future__ import annotations

from typing import Any

from torch import nn

from qvit.distill.layout import Which, matched_blocks, token_layouts
from qvit.errors import RecipeError
from qvit.layers.blocks import transformer_blocks


def check_teacher(teacher: Any, student: Any, dgd: bool, features: Which | None, projected: bool = False) -> None:
    """Compares what the loss will compare.

    Args:
        teacher: a float model.
        student: a timm vision transformer, quantized or not.
        dgd: q and k of all blocks are compared: their number, heads, tokens and windows must be equal; head widths may differ.
        features: which are compared (`qvit.distill.layout.matched_blocks`); tokens and width must be equal, and unless only
            the ``last`` are compared, the number of blocks; ``None`` for none.
        projected: features are compared through a projection, so that any timm ViT or Swin will do.

    Raises:
        RecipeError: they differ in classes or size of images, or in a shape that is compared; the message says in which.
    """
    if teacher.num_classes != student.num_classes:
        raise RecipeError(
            f"The teacher has {teacher.num_classes} classes, the student {student.num_classes}: use another teacher."
        )
    if _images(teacher) not in (None, _images(student)):
        raise RecipeError(
            f"The teacher takes images {_images(teacher)} (channels, height, width), the student {_images(student)}: use a "
            "teacher of the student's input size."
        )
    if dgd:
        theirs, own = _blocks(teacher), _blocks(student)
        if theirs is None:
            raise RecipeError(
                f"The teacher ({type(teacher).__name__}) has no queries and keys that DGD could compare: use a timm ViT, or "
                "set distill.dgd to 0."
            )
        for what in ("blocks", "heads", "tokens", "windows"):
            if theirs[what] != own[what]:  # type: ignore[index]
                raise RecipeError(
                    f"The teacher has {theirs[what]} {what}, the student {own[what]}, and DGD compares them: use a teacher of "  # type: ignore[index]
                    "the student's shape, or set distill.dgd to 0."
                )
    if features is not None:
        _check_features(teacher, student, features, projected)


def _check_features(teacher: Any, student: Any, features: Which, projected: bool) -> None:
    theirs, own = token_layouts(teacher), token_layouts(student)
    if not theirs:
        raise RecipeError(
            f"The teacher ({type(teacher).__name__}) has no features that could be matched: use a timm ViT, or set "
            "distill.feature and activations_first.feature to 0."
        )
    if projected:
        return
    deep = features != "last"
    if deep and theirs[-1] == own[-1] and len(theirs) != len(own):
        raise RecipeError(
            f"The teacher has {len(theirs)} blocks, the student {len(own)}, and features behind "
            f"{'all of them' if features == 'all' else 'each third'} are matched: use a teacher of the student's shape, or set "
            "distill.feature_blocks=last."
        )
    # Of another depth, the last is the first difference to name.
    for block, other in matched_blocks(len(own), len(theirs), features if len(own) == len(theirs) else "last"):
        shape, wanted = theirs[other], own[block]
        if (shape.tokens, shape.width) != (wanted.tokens, wanted.width):
            raise RecipeError(
                f"The teacher's features are {shape.tokens} tokens {shape.width} wide, the student's {wanted.tokens} tokens "
                f"{wanted.width} wide: use a teacher of the student's shape, or set distill.feature and "
                "activations_first.feature to 0."
            )


def _images(model: Any) -> tuple[int, ...] | None:
    """(channels, height, width) of a model's images, where it says so."""
    embed = getattr(model, "patch_embed", None)
    size, weight = getattr(embed, "img_size", None), getattr(getattr(embed, "proj", None), "weight", None)
    return None if size is None or weight is None else (weight.shape[1], *size)


def _tokens(model: Any) -> int | None:
    """Tokens that attend to each other where all of an image do; ``None`` for another model."""
    return model.patch_embed.num_patches + model.num_prefix_tokens if hasattr(model, "num_prefix_tokens") else None


def _blocks(model: Any) -> dict[str, Any] | None:
    """Blocks, heads, tokens and windows of a vision transformer, those of its blocks in a list; ``None`` for another model."""
    attentions = [m for m in model.modules() if isinstance(getattr(m, "qkv", None), nn.Module) and hasattr(m, "num_heads")]
    tokens: list[Any] = [getattr(attention, "window_area", None) or _tokens(model) for attention in attentions]
    if not attentions or None in tokens:
        return None
    windowed: list[Any] = transformer_blocks(model)
    maps = {id(b.attn): b.input_resolution for b in windowed if hasattr(b, "input_resolution")}
    windows = []
    for attention, area in zip(attentions, tokens, strict=True):
        rows, columns = maps.get(id(attention), (area, 1))
        windows.append(rows * columns // area)
    heads = [attention.num_heads for attention in attentions]
    return {"blocks": len(attentions), "heads": _one(heads), "tokens": _one(tokens), "windows": _one(windows)}


def _one(numbers: list[Any]) -> Any:
    """The number, where all are the same."""
    return numbers[0] if len(set(numbers)) == 1 else numbers
