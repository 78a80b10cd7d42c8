"""`IntegerModel`: header and tensors of a frozen model, checked against each other and arranged as ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np

from qvit.architecture import Architecture, SwinArchitecture
from qvit.errors import FileFormatError
from qvit.integer.ops import Block, LayerNorm, Linear, Stage
from qvit.integer.reader import Reader
from qvit.integer.swin import swin_parts
from qvit.integer.vit import vit_parts
from qvit.preprocessing import Preprocessing
from qvit.spec import QuantSpec


@dataclass(frozen=True, eq=False)
class IntegerModel:
    """A frozen vision transformer; build it with `qvit.freeze` or `IntegerModel.load`.

    Attributes:
        header: what the file says about the model: ``architecture``, ``specs`` (point -> `QuantSpec`), ``rectify_eps``,
            ``preprocessing``, ``classes``, ``provenance`` (top-1 of the float parent and of the student and on what data,
            recipe, library versions), and ``residual`` where it is not float32.
        tensors: name -> array as it lies in the file; see `qvit.integer.file`.
        architecture, preprocessing, specs, classes, provenance: parsed from the header.
        residual: what the residual stream is rounded to, ``float32`` or ``float16`` (`qvit.integer.ops.Block`).
        patch: the patch embedding as a linear layer over pixel codes [B, N, C * ph * pw].
        cls_token, dist_token, reg_token: float32 [1, 1 or R, C] or ``None``.
        pos_embed: float32 [1, N, C] (or patches only) or ``None``.
        norm_pre, norm, fc_norm: `LayerNorm` or ``None``; a Swin's ``norm_pre`` is timm's ``patch_embed.norm``.
        stages: the transformer blocks, one `Stage` in a ViT, several with patch merging between them in a Swin.
        heads: one `Linear` a classification head; their logits are averaged.
    """

    header: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    architecture: Architecture
    preprocessing: Preprocessing
    specs: Mapping[str, QuantSpec]
    classes: tuple[str, ...]
    provenance: Mapping[str, Any]
    residual: str
    patch: Linear
    cls_token: np.ndarray | None
    dist_token: np.ndarray | None
    reg_token: np.ndarray | None
    pos_embed: np.ndarray | None
    norm_pre: LayerNorm | None
    stages: tuple[Stage, ...]
    norm: LayerNorm | None
    fc_norm: LayerNorm | None
    heads: tuple[Linear, ...]

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> IntegerModel:
        """Arranges header and tensors as ops.

        Raises:
            FileFormatError: a field or tensor is missing, unknown, of another shape or type, or out of range.
        """
        reader = Reader(header, tensors)
        a = reader.architecture
        parts = swin_parts(reader, a) if isinstance(a, SwinArchitecture) else vit_parts(reader, a)
        reader.finish()
        parsed = a, reader.preprocessing, reader.specs, reader.classes, reader.provenance, reader.residual
        return cls(header, tensors, *parsed, **parts)

    @classmethod
    def load(cls, path: str | Path) -> IntegerModel:
        """Reads a `.qvit` file; raises `FileFormatError` or `InputError` with one sentence where that fails."""
        from qvit.integer.file import read  # file.py knows the format, this file the model

        header, tensors = read(path)
        try:
            return cls.from_tensors(header, tensors)
        except FileFormatError as error:
            raise FileFormatError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> int:
        """Writes a `.qvit` file atomically; returns its size in bytes."""
        from qvit.integer.file import write

        return write(path, self.header, self.tensors)

    @property
    def name(self) -> str:
        """timm's name of the architecture."""
        return self.architecture.name

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The transformer blocks of all stages, in the order in which they run."""
        return tuple(block for stage in self.stages for block in stage.blocks)

    def linears(self) -> list[Linear]:
        """Every linear layer, from the patch embedding to the heads, in the order in which they run."""
        inner: list[Linear] = []
        for stage in self.stages:
            inner += [stage.merging.reduction] if stage.merging else []
            inner += [layer for block in stage.blocks for layer in (block.qkv, block.proj, block.fc1, block.fc2)]
        return [self.patch, *inner, *self.heads]

    def block_bits(self) -> tuple[int, int]:
        """The most common widths of weights and of inputs in the blocks; overrides may differ from them."""
        inner = self.linears()[1 : -len(self.heads)]
        return mode(layer.weight.spec.bits for layer in inner), mode(layer.input.spec.bits for layer in inner)
