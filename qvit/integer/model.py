"""`IntegerModel`: header and tensors of a frozen ViT, checked against each other and arranged as ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np

from qvit.architecture import VitArchitecture
from qvit.errors import FileFormatError, SpecError
from qvit.integer.ops import Attention, Block, LayerNorm, Linear, Quantizer, Rectify, Weight
from qvit.integer.packing import packed_size
from qvit.preprocessing import Preprocessing
from qvit.spec import Dims, Operand, PerChannel, PerGroup, PerTensor, QuantSpec


@dataclass(frozen=True, eq=False)
class IntegerModel:
    """A frozen vision transformer; build it with `qvit.freeze` or `IntegerModel.load`.

    Attributes:
        header: what the file says about the model: ``architecture``, ``specs`` (point -> `QuantSpec`), ``rectify_eps``,
            ``preprocessing``, ``classes``, ``provenance`` (top-1 of the float parent and of the student and on what data,
            recipe, library versions).
        tensors: name -> array as it lies in the file; see `qvit.integer.file`.
        architecture, preprocessing, specs, classes, provenance: parsed from the header.
        patch: the patch embedding as a linear layer over pixel codes [B, N, C * ph * pw].
        cls_token, dist_token, reg_token: float32 [1, 1 or R, C] or ``None``.
        pos_embed: float32 [1, N, C] (or patches only) or ``None``.
        norm_pre, norm, fc_norm: `LayerNorm` or ``None``.
        blocks: one `Block` a transformer block.
        heads: one `Linear` a classification head; their logits are averaged.
    """

    header: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    architecture: VitArchitecture
    preprocessing: Preprocessing
    specs: Mapping[str, QuantSpec]
    classes: tuple[str, ...]
    provenance: Mapping[str, Any]
    patch: Linear
    cls_token: np.ndarray | None
    dist_token: np.ndarray | None
    reg_token: np.ndarray | None
    pos_embed: np.ndarray | None
    norm_pre: LayerNorm | None
    blocks: tuple[Block, ...]
    norm: LayerNorm | None
    fc_norm: LayerNorm | None
    heads: tuple[Linear, ...]

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> IntegerModel:
        """Arranges header and tensors as ops.

        Raises:
            FileFormatError: a field or tensor is missing, unknown, of another shape or type, or out of range.
        """
        return _Reader(header, tensors).model()

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

    def linears(self) -> list[Linear]:
        """Every linear layer, from the patch embedding to the heads."""
        inner = [layer for block in self.blocks for layer in (block.qkv, block.proj, block.fc1, block.fc2)]
        return [self.patch, *inner, *self.heads]

    def block_bits(self) -> tuple[int, int]:
        """The most common widths of weights and of inputs in the blocks; overrides may differ from them."""
        inner = self.linears()[1 : -len(self.heads)]
        return mode(layer.weight.spec.bits for layer in inner), mode(layer.input.spec.bits for layer in inner)


class _Reader:
    """Takes tensors by name, checks each, and complains about what is left over."""

    def __init__(self, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        try:
            self.architecture = VitArchitecture.from_dict(header["architecture"])
            self.preprocessing = Preprocessing.from_dict(header["preprocessing"])
            self.specs = {str(name): QuantSpec.from_dict(spec) for name, spec in header["specs"].items()}
            self.classes = _class_names(header["classes"])
            self.provenance = dict(header["provenance"])
            self.rectify_eps = _eps(header["rectify_eps"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, FileFormatError):
                raise
            detail = str(error) if isinstance(error, SpecError) else f"{type(error).__name__}: {error}"
            raise FileFormatError(f"The header is damaged ({detail}).") from None
        a = self.architecture
        if self.preprocessing.input_size != (a.in_chans, *a.img_size):
            raise FileFormatError("The preprocessing's input size is not the architecture's: the file is damaged.")
        if len(self.classes) != a.num_classes:
            raise FileFormatError(f"The file names {len(self.classes)} classes for {a.num_classes} outputs: it is damaged.")
        self.header, self.tensors = header, tensors
        self.left = set(tensors)
        self.unused = set(self.specs)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A float tensor as finite float32."""
        array = self._raw(name)
        if array.dtype not in (np.float16, np.float32) or array.shape != shape:
            raise FileFormatError(
                f"{name} is {array.dtype}{list(array.shape)} where float{list(shape)} is expected: the file is damaged."
            )
        if not np.isfinite(array).all():
            raise FileFormatError(f"{name} holds values that are not finite: the file is damaged.")
        return array.astype(np.float32)

    def _raw(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise FileFormatError(f"The tensor {name} is missing: the file is damaged.")
        self.left.discard(name)
        return self.tensors[name]

    def quantizer(self, name: str, operand: Operand, dims: Dims) -> Quantizer:
        spec = self.spec(name, operand)
        try:
            scale = self._scale(f"{name}_scale", spec.scale_shape(dims))
            offset_shape = spec.offset_shape(dims)
        except SpecError as error:
            raise FileFormatError(f"{name}: {error}") from None
        offset = None
        if offset_shape is not None:
            offset = self.take(f"{name}_offset", offset_shape)
        elif spec.offset is not None:
            offset = scale * np.float32(0.5)
        return Quantizer(spec, scale, offset)

    def spec(self, name: str, operand: Operand) -> QuantSpec:
        spec = self.specs.get(name)
        if spec is None or spec.operand is not operand:
            raise FileFormatError(f"The spec of {name} is missing or of another operand: the file is damaged.")
        self.unused.discard(name)
        return spec

    def _scale(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        scale = self.take(name, shape)
        if not (scale > 0).all():
            raise FileFormatError(f"{name} holds a scale that is not positive: the file is damaged.")
        return scale

    def weight(self, name: str, rows: int, columns: int) -> Weight:
        spec = self.spec(f"{name}.weight", Operand.WEIGHT)
        packed = self._raw(f"{name}.weight")
        if packed.dtype != np.uint8 or packed.shape != (packed_size(rows * columns, spec.bits),):
            raise FileFormatError(
                f"{name}.weight is {packed.dtype}{list(packed.shape)} where [{rows}, {columns}] at {spec.bits} bits takes "
                f"{packed_size(rows * columns, spec.bits)} bytes: the file is damaged."
            )
        try:
            shape = spec.scale_shape(Dims(channels=columns, rows=rows))
        except SpecError as error:
            raise FileFormatError(f"{name}.weight: {error}") from None
        return Weight(spec, (rows, columns), packed, self._scale(f"{name}.weight_scale", shape))

    def linear(self, name: str, rows: int, columns: int, bias: bool, tokens: int | None) -> Linear:
        source = self.quantizer(f"{name}.input", Operand.INPUT, Dims(channels=columns, rows=tokens))
        weight = self.weight(name, rows, columns)
        groups = {spec.scale for spec in (source.spec, weight.spec) if isinstance(spec.scale, PerGroup)}
        if len(groups) > 1:
            raise FileFormatError(f"The groups of {name}'s weight and input differ in size: the file is damaged.")
        return Linear(name, source, weight, self.take(f"{name}.bias", (rows,)) if bias else None)

    def patch(self) -> Linear:
        """The patch embedding; its input's grid is that of the pixels, so the file need not hold it."""
        a, name = self.architecture, "patch_embed.proj"
        spec = self.spec(f"{name}.input", Operand.INPUT)
        if spec.signed or not isinstance(spec.scale, PerTensor) or not isinstance(spec.offset, PerChannel):
            raise FileFormatError(f"The spec of {name}.input is not that of pixels: the file is damaged.")
        # Before the offsets: a patch size that no weight fits would have them fill the memory.
        weight = self.weight(name, a.embed_dim, a.patch_features)
        area = a.patch_size[0] * a.patch_size[1]
        offset = -np.repeat(np.asarray(self.preprocessing.mean, dtype=np.float32), area)
        pixels = Quantizer(spec, np.asarray([1.0 / spec.qp], dtype=np.float32), offset)
        bias = self.take(f"{name}.bias", (a.embed_dim,)) if a.patch_bias else None
        return Linear(name, pixels, weight, bias)

    def norm(self, name: str) -> LayerNorm:
        width = (self.architecture.embed_dim,)
        return LayerNorm(self.take(f"{name}.weight", width), self.take(f"{name}.bias", width), self.architecture.norm_eps)

    def rectify(self, name: str) -> Rectify | None:
        if self.rectify_eps is None:
            return None
        shape = (self.architecture.num_heads, self.architecture.head_dim)
        return Rectify(self.take(f"{name}.weight", shape), self.take(f"{name}.bias", shape), self.rectify_eps)

    def attention(self, name: str) -> Attention:
        a = self.architecture
        width = Dims(channels=a.head_dim, rows=a.num_tokens, heads=a.num_heads)
        square = Dims(channels=a.num_tokens, rows=a.num_tokens, heads=a.num_heads)
        return Attention(
            heads=a.num_heads,
            head_dim=a.head_dim,
            factor=a.head_dim**-0.5,
            rectify_q=self.rectify(f"{name}.rectify_q"),
            rectify_k=self.rectify(f"{name}.rectify_k"),
            q=self.quantizer(f"{name}.q", Operand.QUERY, width),
            k=self.quantizer(f"{name}.k", Operand.KEY, width),
            v=self.quantizer(f"{name}.v", Operand.VALUE, width),
            map=self.quantizer(f"{name}.map", Operand.MAP, square),
        )

    def block(self, index: int) -> Block:
        a, name = self.architecture, f"blocks.{index}"
        c, hidden, tokens = a.embed_dim, a.mlp_hidden, a.num_tokens
        return Block(
            norm1=self.norm(f"{name}.norm1"),
            qkv=self.linear(f"{name}.attn.qkv", 3 * c, c, a.qkv_bias, tokens),
            attention=self.attention(f"{name}.attn"),
            proj=self.linear(f"{name}.attn.proj", c, c, a.proj_bias, tokens),
            ls1=self.take(f"{name}.ls1.gamma", (c,)) if a.layer_scale else None,
            norm2=self.norm(f"{name}.norm2"),
            fc1=self.linear(f"{name}.mlp.fc1", hidden, c, a.proj_bias, tokens),
            fc2=self.linear(f"{name}.mlp.fc2", c, hidden, a.proj_bias, tokens),
            ls2=self.take(f"{name}.ls2.gamma", (c,)) if a.layer_scale else None,
        )

    def model(self) -> IntegerModel:
        a = self.architecture
        c = a.embed_dim
        embedded = a.num_patches if a.no_embed_class else a.num_tokens
        parts = IntegerModel(
            header=self.header,
            tensors=self.tensors,
            architecture=a,
            preprocessing=self.preprocessing,
            specs=self.specs,
            classes=self.classes,
            provenance=self.provenance,
            patch=self.patch(),
            cls_token=self.take("cls_token", (1, 1, c)) if a.class_token else None,
            dist_token=self.take("dist_token", (1, 1, c)) if a.dist_token else None,
            reg_token=self.take("reg_token", (1, a.reg_tokens, c)) if a.reg_tokens else None,
            pos_embed=self.take("pos_embed", (1, embedded, c)) if a.pos_embed else None,
            norm_pre=self.norm("norm_pre") if a.pre_norm else None,
            blocks=tuple(self.block(index) for index in range(a.depth)),
            norm=self.norm("norm") if a.final_norm else None,
            fc_norm=self.norm("fc_norm") if a.fc_norm else None,
            heads=tuple(self.linear(name, a.num_classes, c, True, None) for name in a.heads),
        )
        if self.left:
            raise FileFormatError(f"The tensor {sorted(self.left)[0]} belongs to nothing in the model: the file is damaged.")
        if self.unused:
            raise FileFormatError(f"The spec of {sorted(self.unused)[0]} belongs to nothing in the model: the file is damaged.")
        return parts


def _class_names(names: Any) -> tuple[str, ...]:
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise FileFormatError("The header's class names are no list of names: the file is damaged.")
    return tuple(names)


def _eps(value: Any) -> float | None:
    if value is not None and not (isinstance(value, (int, float)) and 0 <= value < 1):
        raise FileFormatError(f"The header's rectify_eps is {value!r}, not a small number: the file is damaged.")
    return None if value is None else float(value)
