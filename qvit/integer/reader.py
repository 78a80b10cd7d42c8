"""Takes the ops of an integer model out of header and tensors, checking each against the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qvit.architecture import architecture_from_dict
from qvit.errors import FileFormatError, SpecError
from qvit.integer.ops import Attention, LayerNorm, Linear, Quantizer, Rectify, Weight, Windows
from qvit.integer.packing import packed_size
from qvit.preprocessing import Preprocessing
from qvit.spec import RESIDUALS, Dims, Operand, PerChannel, PerGroup, PerTensor, QuantSpec


class Reader:
    """Takes tensors by name, checks each, and complains about what is left over."""

    def __init__(self, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        try:
            self.architecture = architecture_from_dict(header["architecture"])
            self.preprocessing = Preprocessing.from_dict(header["preprocessing"])
            self.specs = {str(name): QuantSpec.from_dict(spec) for name, spec in header["specs"].items()}
            self.classes = _class_names(header["classes"])
            self.provenance = dict(header["provenance"])
            self.rectify_eps = _eps(header["rectify_eps"])
            self.residual = _residual(header.get("residual", "float32"))
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

    def norm(self, name: str, width: int) -> LayerNorm:
        weight, bias = (self.take(f"{name}.{part}", (width,)) for part in ("weight", "bias"))
        return LayerNorm(weight, bias, self.architecture.norm_eps)

    def rectify(self, name: str, heads: int, head_dim: int) -> Rectify | None:
        if self.rectify_eps is None:
            return None
        shape = (heads, head_dim)
        return Rectify(self.take(f"{name}.weight", shape), self.take(f"{name}.bias", shape), self.rectify_eps)

    def attention(
        self, name: str, heads: int, head_dim: int, keys: int, rows: int | None, windows: Windows | None = None
    ) -> Attention:
        """``keys``: N of the softmax map; ``rows``: the same where scales may follow tokens, else ``None``."""
        width = Dims(channels=head_dim, rows=rows, heads=heads)
        square = Dims(channels=keys, rows=rows, heads=heads)
        return Attention(
            heads=heads,
            head_dim=head_dim,
            factor=head_dim**-0.5,
            rectify_q=self.rectify(f"{name}.rectify_q", heads, head_dim),
            rectify_k=self.rectify(f"{name}.rectify_k", heads, head_dim),
            q=self.quantizer(f"{name}.q", Operand.QUERY, width),
            k=self.quantizer(f"{name}.k", Operand.KEY, width),
            v=self.quantizer(f"{name}.v", Operand.VALUE, width),
            map=self.quantizer(f"{name}.map", Operand.MAP, square),
            windows=windows,
        )

    def finish(self) -> None:
        """Raises `FileFormatError` where a tensor or a spec was not asked for."""
        if self.left:
            raise FileFormatError(f"The tensor {sorted(self.left)[0]} belongs to nothing in the model: the file is damaged.")
        if self.unused:
            raise FileFormatError(f"The spec of {sorted(self.unused)[0]} belongs to nothing in the model: the file is damaged.")


def _class_names(names: Any) -> tuple[str, ...]:
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise FileFormatError("The header's class names are no list of names: the file is damaged.")
    return tuple(names)


def _eps(value: Any) -> float | None:
    if value is not None and not (isinstance(value, (int, float)) and 0 <= value < 1):
        raise FileFormatError(f"The header's rectify_eps is {value!r}, not a small number: the file is damaged.")
    return None if value is None else float(value)


def _residual(value: Any) -> str:
    if value not in RESIDUALS:
        raise FileFormatError(f"The header's residual is {value!r}, not {' or '.join(RESIDUALS)}: the file is damaged.")
    return value
