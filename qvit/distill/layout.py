"""Where the tokens of a vision transformer lie: behind each block, and which blocks of two models belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qvit.layers.blocks import transformer_blocks

Which = Literal["last", "thirds", "all"]


@dataclass(frozen=True)
class TokenLayout:
    """The tokens [B, N, width] behind a block: ``prefix`` tokens without a place, then a map, row by row.

    Attributes:
        prefix: class, distillation and register tokens.
        has_class_token: the first of them is a class token.
        rows, columns: of the map.
        width: channels of a token.
    """

    prefix: int
    has_class_token: bool
    rows: int
    columns: int
    width: int

    @property
    def tokens(self) -> int:
        """N, all tokens."""
        return self.prefix + self.rows * self.columns


def token_layouts(model: Any) -> list[TokenLayout]:
    """What leaves each block of a timm ViT or Swin Transformer, quantized or not; empty for another model."""
    blocks: list[Any] = transformer_blocks(model)
    if all(hasattr(block, "input_resolution") for block in blocks):
        maps = [(block.input_resolution, block.dim) for block in blocks]
        return [TokenLayout(0, False, rows, columns, width) for (rows, columns), width in maps]
    if not hasattr(model, "num_prefix_tokens"):
        return []
    has_class_token = getattr(model, "cls_token", None) is not None
    rows, columns = model.patch_embed.grid_size
    return [TokenLayout(model.num_prefix_tokens, has_class_token, rows, columns, model.embed_dim)] * len(blocks)


def matched_blocks(blocks: int, others: int, which: Which) -> list[tuple[int, int]]:
    """Pairs of blocks, counted from 0, at the same share of two models' depths; the last pair is the two last blocks.

    Args:
        blocks: of the student.
        others: blocks of the teacher.
        which: the ``last`` block alone, those that end a third of the student's depth (``thirds``), or ``all``.
    """
    if which == "last":
        ends = {blocks}
    elif which == "thirds":
        ends = {max(round(blocks * third / 3), 1) for third in (1, 2, 3)}
    else:
        ends = set(range(1, blocks + 1))
    return [(end - 1, max(round(end * others / blocks), 1) - 1) for end in sorted(ends)]
