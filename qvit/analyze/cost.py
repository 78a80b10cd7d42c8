"""What a quantized vision transformer costs: multiplies by bit width, parameters, packed bytes, theoretical speed-up.

Counted from the architecture and the specs alone; no weights are needed. docs/cost-model.md defines every number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qvit.analyze.products import MatrixProduct, other_parameters, products_of
from qvit.errors import SpecError
from qvit.integer.packing import packed_size
from qvit.spec import QuantSpec

FLOAT_BITS = 32

SPEED_UP_DEFINITION = (
    "multiplies of all matrix products / sum of multiplies x b/32, b being the wider of a product's two operands: the paper's "
    "count, in which a b-bit multiply costs b/32 of a float one; additions, LayerNorm, softmax and GELU are not counted"
)
BIT_OPERATIONS_DEFINITION = "sum of multiplies x bits of one operand x bits of the other, over all matrix products"


@dataclass(frozen=True)
class ProductCost:
    """One matrix product with the widths of its operands, for one image.

    Attributes:
        product: its shape.
        left: spec of a linear layer's weight; of q; of the softmax map.
        right: spec of a linear layer's input; of k; of v.
    """

    product: MatrixProduct
    left: QuantSpec
    right: QuantSpec

    @property
    def name(self) -> str:
        """As `MatrixProduct.name`."""
        return self.product.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As `MatrixProduct.shape`."""
        return self.product.shape

    @property
    def multiplies(self) -> int:
        """Multiply-accumulates."""
        return self.product.multiplies

    @property
    def bits(self) -> int:
        """The wider operand's bits: what a multiplier must be built for."""
        return max(self.left.bits, self.right.bits)

    @property
    def bit_operations(self) -> int:
        """See `BIT_OPERATIONS_DEFINITION`."""
        return self.multiplies * self.left.bits * self.right.bits

    @property
    def parameters(self) -> int:
        """Of weight and bias; 0 in attention."""
        return self.product.weights + self.product.bias * self.product.columns

    @property
    def weight_bytes(self) -> int:
        """Of the packed weight codes; 0 in attention."""
        return packed_size(self.product.weights, self.left.bits)


@dataclass(frozen=True)
class ModelCost:
    """All matrix products of a model, for one image.

    Attributes:
        products: in the order in which they run.
        other_parameters: of the float model outside of them (`qvit.analyze.products.other_parameters`).
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
    def bit_operations(self) -> int:
        """See `BIT_OPERATIONS_DEFINITION`."""
        return sum(product.bit_operations for product in self.products)

    @property
    def parameters(self) -> int:
        """Parameters of the float model, without those of IRM and of the quantizers."""
        return sum(product.parameters for product in self.products) + self.other_parameters

    @property
    def weight_bytes(self) -> int:
        """Packed weight codes of all layers."""
        return sum(product.weight_bytes for product in self.products)


def model_cost(architecture: Any, specs: Mapping[str, QuantSpec]) -> ModelCost:
    """Counts a vision transformer.

    Args:
        architecture: of the float model, of a family that `qvit.analyze.products.products_of` knows.
        specs: name of a quantization point -> its spec; `qvit.analyze.products.specs_of` makes them from a `ModelSpec`.

    Raises:
        SpecError: a point of the architecture has no spec.
        UnsupportedModelError: the architecture is of another family.
    """

    def spec(name: str) -> QuantSpec:
        if name not in specs:
            raise SpecError(f"The quantization point {name} has no spec: give the specs of all points of the architecture.")
        return specs[name]

    products = products_of(architecture)
    costs = (ProductCost(product, *(spec(point) for point in product.points)) for product in products)
    return ModelCost(tuple(costs), other_parameters(architecture))
