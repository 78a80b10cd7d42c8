"""How many rows of what width blocks of a model work on, and how they are divided into images and heads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sequences that blocks work on.

    Attributes:
        images: sequences: images, or windows of all images.
        tokens: of a sequence.
        width, heads, hidden: C, H and the outputs of fc1.
        windows: sequences of an image.
    """

    images: int
    tokens: int
    width: int
    heads: int
    hidden: int
    windows: int = 1

    @property
    def rows(self) -> int:
        """Tokens of all sequences."""
        return self.images * self.tokens

    @property
    def head_dim(self) -> int:
        """D."""
        return self.width // self.heads
