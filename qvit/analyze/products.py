"""The matrix products of a vision transformer, listed from its architecture alone: one function a family.

Everything that counts costs goes over this list (`qvit.analyze.cost`, `qvit.analyze.roofline`, `qvit.analyze.units`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qvit.architecture import SwinArchitecture, VitArchitecture
from qvit.errors import UnsupportedModelError
from qvit.spec import ModelSpec, Operand, QuantSpec

LINEAR, SCORES, VALUES = "linear", "scores", "values"
_OPERANDS = {
    LINEAR: (Operand.WEIGHT, Operand.INPUT),
    SCORES: (Operand.QUERY, Operand.KEY),
    VALUES: (Operand.MAP, Operand.VALUE),
}


@dataclass(frozen=True)
class MatrixProduct:
    """One matrix product [M, K] x [K, N] for one image; the products of all heads (and windows) of attention count as one.

    Attributes:
        name: of the linear layer, or ``blocks.0.attn.scores`` (q k^T) and ``blocks.0.attn.values`` (map v).
        kind: ``linear``, ``scores`` or ``values``.
        rows: M; tokens of a linear layer; heads x windows x tokens of a window in attention, where a ViT has one window.
        inner: K, what is summed over: input channels; head width of ``scores``; tokens of a window of ``values``.
        columns: N: output channels; tokens of a window of ``scores``; head width of ``values``.
        edge: belongs to the first or the last layer.
        bias: a linear layer's.
        codes: codes of activations that are read and written, each product fused with what follows it: scores and maps are
            never written, q, k and v once, and read by the product that needs them.
        floats: values of the residual stream and logits that are read and written. LayerNorm and quantization are fused into
            the product behind them, bias and residual addition into the product in front.
    """

    name: str
    kind: str
    rows: int
    inner: int
    columns: int
    edge: bool = False
    bias: bool = False
    codes: int = 0
    floats: int = 0

    @property
    def multiplies(self) -> int:
        """Multiply-accumulates: M K N."""
        return self.rows * self.inner * self.columns

    @property
    def shape(self) -> tuple[int, ...]:
        """(output, input channels) of a linear layer's weight; (heads x windows, tokens, head width) of attention."""
        if self.kind == LINEAR:
            return (self.columns, self.inner)
        tokens, width = (self.columns, self.inner) if self.kind == SCORES else (self.inner, self.columns)
        return (self.rows // tokens, tokens, width)

    @property
    def weights(self) -> int:
        """Entries of a linear layer's weight; 0 in attention."""
        return self.inner * self.columns if self.kind == LINEAR else 0

    @property
    def points(self) -> tuple[str, str]:
        """Names of the quantization points of both operands: weight and input; q and k; softmax map and v."""
        prefix = self.name if self.kind == LINEAR else self.name.rpartition(".")[0]
        left, right = (operand.value for operand in _OPERANDS[self.kind])
        return f"{prefix}.{left}", f"{prefix}.{right}"


def products_of(architecture: Any) -> tuple[MatrixProduct, ...]:
    """The products of a model in the order in which they run.

    Args:
        architecture: `VitArchitecture` or `SwinArchitecture`.

    Raises:
        UnsupportedModelError: the architecture is of another family.
    """
    if isinstance(architecture, VitArchitecture):
        return tuple(_vit(architecture))
    if isinstance(architecture, SwinArchitecture):
        return tuple(_swin(architecture))
    raise UnsupportedModelError(f"The products of {type(architecture).__name__} are not known: qvit counts ViT, DeiT and Swin.")


def other_parameters(architecture: VitArchitecture | SwinArchitecture) -> int:
    """Parameters of the float model outside of the products: norms, LayerScales, tokens, position embedding or biases."""
    if isinstance(architecture, VitArchitecture):
        a = architecture
        norms = 2 * a.depth + a.pre_norm + a.final_norm + a.fc_norm
        positions = (a.num_patches if a.no_embed_class else a.num_tokens) if a.pos_embed else 0
        return a.embed_dim * (2 * norms + 2 * a.depth * a.layer_scale + a.num_prefix_tokens + positions)
    s = architecture
    widths = [s.width(stage) for stage in range(s.stages)]
    tables = sum(
        depth * heads * (2 * window[0] - 1) * (2 * window[1] - 1)
        for depth, heads, window in zip(s.depths, s.num_heads, s.windows, strict=True)
    )
    blocks = sum(2 * 2 * depth * width for depth, width in zip(s.depths, widths, strict=True))
    merging = sum(2 * 4 * width for width in widths[:-1])
    return 2 * s.embed_dim + blocks + merging + 2 * widths[-1] + tables


def specs_of(products: Iterable[MatrixProduct], spec: ModelSpec) -> dict[str, QuantSpec]:
    """Name of a quantization point -> its spec in a model that is quantized as ``spec`` says.

    Raises:
        SpecError: an override asks for what is not executable, or matches no point.
    """
    specs = {
        point: spec.resolve(point, operand, product.edge)
        for product in products
        for point, operand in zip(product.points, _OPERANDS[product.kind], strict=True)
    }
    spec.check_overrides(list(specs))
    return specs


def has_mixed_widths(architecture: Any, specs: Mapping[str, QuantSpec]) -> bool:
    """Whether weights, or activations, between the first and the last layer have more than one width.

    Args:
        architecture: see `products_of`.
        specs: name of a quantization point -> its spec.
    """
    inner = [product for product in products_of(architecture) if not product.edge]
    weights = {specs[product.points[0]].bits for product in inner if product.kind == LINEAR}
    inputs = {specs[point].bits for product in inner for point in product.points[product.kind == LINEAR :]}
    return len(weights) > 1 or len(inputs) > 1


def _vit(a: VitArchitecture) -> Iterator[MatrixProduct]:
    """With N tokens, P patches, C channels, H heads of D = C / H, F hidden features of the MLP and k classes:

    patch embedding  P x (colours x patch height x patch width) x C
    qkv, proj        N x C x 3C,  N x C x C
    scores, values   H N x D x N,  H N x N x D
    fc1, fc2         N x C x F,  N x F x C
    a head           1 x C x k
    """
    c = a.embed_dim
    yield _patches(a.num_patches, a.patch_features, c, a.patch_bias)
    for index in range(a.depth):
        yield from _block(f"blocks.{index}", a.num_tokens, a.num_tokens, c, a.num_heads, a.mlp_hidden, a.qkv_bias, a.proj_bias)
    for head in a.heads:
        yield MatrixProduct(head, LINEAR, 1, c, a.num_classes, True, True, floats=c + a.num_classes)


def _swin(s: SwinArchitecture) -> Iterator[MatrixProduct]:
    """Of a stage with N tokens in windows of A, C channels, H heads of D = C / H and F hidden features, each block takes

        qkv, proj        N x C x 3C,  N x C x C
        scores, values   H N x D x A,  H N x A x D
        fc1, fc2         N x C x F,  N x F x C

    and every stage but the first begins with patch merging, which takes four tokens of the stage before it: N x 2C x C.
    """
    yield _patches(s.num_patches, s.patch_features, s.embed_dim, s.patch_bias)
    c = s.embed_dim
    for stage, depth in enumerate(s.depths):
        c, (height, width) = s.width(stage), s.map(stage)
        tokens = height * width
        if stage:
            name = f"layers.{stage}.downsample.reduction"
            yield MatrixProduct(name, LINEAR, tokens, 2 * c, c, floats=3 * tokens * c)
        area = s.windows[stage][0] * s.windows[stage][1]
        for index in range(depth):
            block = f"layers.{stage}.blocks.{index}"
            yield from _block(block, tokens, area, c, s.num_heads[stage], s.mlp_hidden[stage], s.qkv_bias, True)
    yield MatrixProduct("head.fc", LINEAR, 1, c, s.num_classes, True, True, floats=c + s.num_classes)


def _patches(patches: int, features: int, c: int, bias: bool) -> MatrixProduct:
    name = "patch_embed.proj"
    return MatrixProduct(name, LINEAR, patches, features, c, True, bias, codes=patches * features, floats=patches * c)


def _block(
    name: str, tokens: int, window: int, c: int, heads: int, hidden: int, qkv_bias: bool, bias: bool
) -> Iterator[MatrixProduct]:
    """One transformer block on ``tokens`` tokens that attend to each other in windows of ``window`` tokens."""
    n, rows, d = tokens, heads * tokens, c // heads
    stream = n * c
    attention, mlp = f"{name}.attn", f"{name}.mlp"
    yield MatrixProduct(f"{attention}.qkv", LINEAR, n, c, 3 * c, bias=qkv_bias, codes=3 * stream, floats=stream)
    yield MatrixProduct(f"{attention}.scores", SCORES, rows, d, window, codes=2 * stream)
    yield MatrixProduct(f"{attention}.values", VALUES, rows, window, d, codes=2 * stream)
    yield MatrixProduct(f"{attention}.proj", LINEAR, n, c, c, bias=bias, codes=stream, floats=2 * stream)
    yield MatrixProduct(f"{mlp}.fc1", LINEAR, n, c, hidden, bias=bias, codes=n * hidden, floats=stream)
    yield MatrixProduct(f"{mlp}.fc2", LINEAR, n, hidden, c, bias=bias, codes=n * hidden, floats=2 * stream)
