"""Whether a teacher fits a student, asked before training starts."""

from __future__ import annotations

from typing import Any

from torch import nn

from qvit.errors import RecipeError


def check_teacher(teacher: Any, student: Any, dgd: bool, features: str | None) -> None:
    """Compares what the loss will compare.

    Args:
        teacher: a float model.
        student: a timm vision transformer, quantized or not.
        dgd: q and k of all blocks are compared: their number, heads and tokens must be equal; head widths may differ.
        features: which are compared, those behind the ``last`` block or behind ``all``; tokens and embedding width must be
            equal, and for ``all`` the number of blocks; ``None`` for none.

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
        for what in ("blocks", "heads", "tokens"):
            if theirs[what] != own[what]:  # type: ignore[index]
                raise RecipeError(
                    f"The teacher has {theirs[what]} {what}, the student {own[what]}, and DGD compares them: use a teacher of "  # type: ignore[index]
                    "the student's shape, or set distill.dgd to 0."
                )
    if features is not None:
        shape, wanted = _features(teacher), _features(student)
        if shape is None:
            raise RecipeError(
                f"The teacher ({type(teacher).__name__}) has no features that could be matched: use a timm ViT, or set "
                "distill.feature and activations_first.feature to 0."
            )
        if shape != wanted:
            raise RecipeError(
                f"The teacher's features are {shape[0]} tokens {shape[1]} wide, the student's {wanted[0]} tokens {wanted[1]} "  # type: ignore[index]
                "wide: use a teacher of the student's shape, or set distill.feature and activations_first.feature to 0."
            )
        if features == "all" and len(teacher.blocks) != len(student.blocks):
            raise RecipeError(
                f"The teacher has {len(teacher.blocks)} blocks, the student {len(student.blocks)}, and features behind all of "
                "them are matched: use a teacher of the student's shape, or set distill.feature_blocks=last."
            )


def _images(model: Any) -> tuple[int, ...] | None:
    """(channels, height, width) of a model's images, where it says so."""
    embed = getattr(model, "patch_embed", None)
    size, weight = getattr(embed, "img_size", None), getattr(getattr(embed, "proj", None), "weight", None)
    return None if size is None or weight is None else (weight.shape[1], *size)


def _tokens(model: Any) -> int:
    return model.patch_embed.num_patches + model.num_prefix_tokens


def _blocks(model: Any) -> dict[str, int] | None:
    """Blocks, heads and tokens of a vision transformer; ``None`` for another model."""
    attentions = [m for m in model.modules() if isinstance(getattr(m, "qkv", None), nn.Module) and hasattr(m, "num_heads")]
    if not attentions or not hasattr(model, "num_prefix_tokens"):
        return None
    return {"blocks": len(attentions), "heads": attentions[0].num_heads, "tokens": _tokens(model)}


def _features(model: Any) -> tuple[int, int] | None:
    """(tokens, width) of what leaves the blocks of a vision transformer; ``None`` for another model."""
    if not hasattr(model, "blocks") or not hasattr(model, "num_prefix_tokens"):
        return None
    return _tokens(model), model.embed_dim
