"""What a quantized vision transformer costs: multiplies by bit width, parameters, packed bytes, theoretical speed-up.

Counted from the architecture and the specs alone; no weights are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from qvit.architecture import VitArchitecture
from qvit.errors import SpecError
from qvit.integer.packing import packed_size
from qvit.spec import QuantSpec

FLOAT_BITS = 32

SPEED_UP_DEFINITION = (
    "multiplies of all matrix products / sum of multiplies x b/32, b being the wider of a product's two operands: the paper's "
    "count, in which a b-bit multiply costs b/32 of a float one; additions, LayerNorm, softmax and GELU are not counted"
)


@dataclass(frozen=True)
class ProductCost:
    """One matrix product, for one image.

    Attributes:
        name: of the linear layer, or ``blocks.0.attn.scores`` (q k^T) and ``blocks.0.attn.values`` (map v).
        left: spec of a linear layer's weight; of q; of the softmax map.
        right: spec of a linear layer's input; of k; of v.
        shape: (M, K) of a weight; (H, N, D) of the two products of attention.
        multiplies: multiply-accumulates.
        parameters: of weight and bias; 0 in attention.
        weight_bytes: of the packed weight codes.
    """

    name: str
    left: QuantSpec
    right: QuantSpec
    shape: tuple[int, ...]
    multiplies: int
    parameters: int = 0
    weight_bytes: int = 0

    @property
    def bits(self) -> int:
        """The wider operand's bits: what a multiplier must be built for."""
        return max(self.left.bits, self.right.bits)


@dataclass(frozen=True)
class ModelCost:
    """All matrix products of a model, for one image.

    Attributes:
        products: in the order in which they run.
        other_parameters: of the float model outside of them: LayerNorm, LayerScale, tokens, position embedding.
    """

    products: tuple[ProductCost, ...]
    other_parameters: int

    @cached_property
    def multiplies(self) -> int:
        """Multiplies of all products."""
        return sum(product.multiplies for product in self.products)

    @cached_property
    def multiplies_by_bits(self) -> dict[int, int]:
        """Bits of the wider operand -> multiplies, narrow first."""
        counts: dict[int, int] = {}
        for product in self.products:
            counts[product.bits] = counts.get(product.bits, 0) + product.multiplies
        return dict(sorted(counts.items()))

    @property
    def speed_up(self) -> float:
        """Theoretical speed-up over float; see `SPEED_UP_DEFINITION`."""
        return self.multiplies * FLOAT_BITS / sum(bits * count for bits, count in self.multiplies_by_bits.items())

    @property
    def parameters(self) -> int:
        """Parameters of the float model, without those of IRM and of the quantizers."""
        return sum(product.parameters for product in self.products) + self.other_parameters

    @property
    def weight_bytes(self) -> int:
        """Packed weight codes of all layers."""
        return sum(product.weight_bytes for product in self.products)


def model_cost(architecture: VitArchitecture, specs: Mapping[str, QuantSpec]) -> ModelCost:
    """Counts a vision transformer.

    With N tokens, P patches, C channels, H heads of D = C / H, F hidden features of the MLP and k classes, an image takes

        patch embedding  P x (colours x patch height x patch width) x C
        qkv, proj        N x C x 3C,  N x C x C
        scores, values   H x N x N x D = N x N x C each
        fc1, fc2         N x C x F each
        a head           C x k

    Args:
        architecture: of the float model.
        specs: name of a quantization point -> its spec.

    Raises:
        SpecError: a point of the architecture has no spec.
    """
    a = architecture
    n, c, hidden = a.num_tokens, a.embed_dim, a.mlp_hidden

    def spec(name: str) -> QuantSpec:
        if name not in specs:
            raise SpecError(f"The quantization point {name} has no spec: give the specs of all points of the architecture.")
        return specs[name]

    def linear(name: str, rows: int, columns: int, bias: bool, positions: int) -> ProductCost:
        weight, size = spec(f"{name}.weight"), rows * columns
        return ProductCost(
            name,
            weight,
            spec(f"{name}.input"),
            (rows, columns),
            positions * size,
            size + rows * bias,
            packed_size(size, weight.bits),
        )

    def attention(name: str, left: str, right: str, prefix: str) -> ProductCost:
        return ProductCost(
            f"{prefix}.{name}", spec(f"{prefix}.{left}"), spec(f"{prefix}.{right}"), (a.num_heads, n, a.head_dim), n * n * c
        )

    products = [linear("patch_embed.proj", c, a.patch_features, a.patch_bias, a.num_patches)]
    for index in range(a.depth):
        block = f"blocks.{index}"
        products += [
            linear(f"{block}.attn.qkv", 3 * c, c, a.qkv_bias, n),
            attention("scores", "q", "k", f"{block}.attn"),
            attention("values", "map", "v", f"{block}.attn"),
            linear(f"{block}.attn.proj", c, c, a.proj_bias, n),
            linear(f"{block}.mlp.fc1", hidden, c, a.proj_bias, n),
            linear(f"{block}.mlp.fc2", c, hidden, a.proj_bias, n),
        ]
    products += [linear(head, a.num_classes, c, True, 1) for head in a.heads]
    return ModelCost(tuple(products), _other_parameters(a))


def _other_parameters(a: VitArchitecture) -> int:
    """Parameters outside the matrix products: LayerNorms, LayerScales, tokens and position embedding."""
    norms = 2 * a.depth + a.pre_norm + a.final_norm + a.fc_norm
    positions = (a.num_patches if a.no_embed_class else a.num_tokens) if a.pos_embed else 0
    return a.embed_dim * (2 * norms + 2 * a.depth * a.layer_scale + a.num_prefix_tokens + positions)
