"""The parts of a model whose width is chosen as one: four linear layers and the attention of each block.

A linear layer's weight and input share a width; so do q, k, v and the softmax map of an attention. The first and the last layer
have no choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qvit.analyze.products import LINEAR, MatrixProduct
from qvit.spec import ModelSpec, Override, QuantSpec, matches


@dataclass(frozen=True)
class Unit:
    """What gets one width.

    Attributes:
        name: of the linear layer, or ``blocks.0.attn.attention``.
        patterns: of `ModelSpec.overrides`, that match its quantization points and no others.
        points: its quantization points.
        products: names of its matrix products: one, or ``scores`` and ``values``.
    """

    name: str
    patterns: tuple[str, ...]
    points: tuple[str, ...]
    products: tuple[str, ...]


def units_of(products: Iterable[MatrixProduct]) -> list[Unit]:
    """The units of a model, in the order in which they run."""
    units: dict[str, Unit] = {}
    for product in products:
        if product.edge:
            continue
        prefix = product.name.rpartition(".")[0]
        linear = product.kind == LINEAR
        name = product.name if linear else f"{prefix}.attention"
        # "[qkv]" is one character: it does not match the layer qkv.
        patterns = (name,) if linear else (f"{prefix}.[qkv]", f"{prefix}.map")
        before = units.get(name, Unit(name, patterns, (), ()))
        units[name] = replace(before, points=before.points + product.points, products=(*before.products, product.name))
    return list(units.values())


def widths_of(units: Iterable[Unit], specs: Mapping[str, QuantSpec]) -> dict[str, int | str]:
    """Name of a unit -> its bits in a model; of a unit whose points an override made unequal, all of them (``4 and 8``).

    Args:
        units: of the model.
        specs: name of a quantization point -> its spec.
    """
    bits = {unit.name: sorted({specs[point].bits for point in unit.points}) for unit in units}
    return {name: widths[0] if len(widths) == 1 else " and ".join(map(str, widths)) for name, widths in bits.items()}


def with_widths(spec: ModelSpec, units: Sequence[Unit], widths: Mapping[str, int]) -> ModelSpec:
    """The spec with a width for every unit.

    Its own overrides come after those of the units, so they win; ``weight_bits`` and ``act_bits`` become the most common width,
    and only units of another one need an override.

    Args:
        spec: the rest.
        units: of the model.
        widths: name of a unit -> bits.
    """
    common = Counter(widths[unit.name] for unit in units).most_common(1)[0][0]
    chosen: dict[str, int] = {}
    for unit in units:
        if widths[unit.name] != common:
            for pattern in unit.patterns:
                # A mapping has a pattern once: where it is one of the spec's own, points stand for the unit.
                taken = pattern in spec.overrides
                names = [point for point in unit.points if matches(pattern, point)] if taken else [pattern]
                chosen |= dict.fromkeys(names, widths[unit.name])
    overrides: dict[str, int | Override] = {pattern: bits for pattern, bits in chosen.items() if pattern not in spec.overrides}
    for pattern, change in spec.overrides.items():
        if pattern in chosen and isinstance(change, Mapping):  # a point's own name
            change = {"bits": _bits_so_far(pattern, overrides, chosen[pattern]), **change}
        overrides[pattern] = change
    return replace(spec, weight_bits=common, act_bits=common, overrides=overrides)


def _bits_so_far(point: str, overrides: Mapping[str, int | Override], chosen: int) -> int:
    """The bits of a point: those of the last override that says some, else the ``chosen`` ones."""
    for pattern, change in overrides.items():
        if matches(pattern, point):
            chosen = change if isinstance(change, int) else change.get("bits", chosen)
    return chosen
