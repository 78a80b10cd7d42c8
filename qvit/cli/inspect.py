"""``qvit inspect``: what is in a ``.qvit`` file. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvit.analyze.cost import SPEED_UP_DEFINITION, ModelCost, ProductCost, model_cost
from qvit.analyze.entropy import code_entropy
from qvit.cli import options
from qvit.cli.results import write_results
from qvit.cli.show import count, show_facts, show_table
from qvit.spec import QuantSpec, granularity_name

if TYPE_CHECKING:
    from qvit.integer.model import IntegerModel
    from qvit.integer.ops import Linear

_SHOWN_CLASSES = 10


def command(
    file: Annotated[Path, typer.Argument(help="A .qvit file.")],
    json: options.Json = None,
) -> None:
    """Show what is in a frozen file.

    A table of its layers: bits, granularities, shape, bytes, entropy of the codes; then totals, multiplies by bit width,
    theoretical speed-up, classes and provenance. Needs no PyTorch.

    Example:

        qvit inspect deit_small_w4a4.qvit
    """
    from qvit.integer.model import IntegerModel

    model = IntegerModel.load(file)
    cost = model_cost(model.architecture, model.specs)
    layers = {layer.name: layer for layer in model.linears()}
    rows = [_row(product, layers.get(product.name), model) for product in cost.products]
    show_table(
        f"{file.name}: bits and granularity are weight's / input's, q's / k's, softmax map's / v's",
        ["layer", "bits", "scales (+ offsets)", "shape", "bytes", "entropy", "multiplies"],
        [
            (
                row["layer"],
                f"{row['weight_bits']}/{row['act_bits']}",
                row["granularity"],
                row["shape"],
                count(row["bytes"]),
                "" if row["entropy"] is None else f"{row['entropy']:.2f}",
                count(row["multiplies"]),
            )
            for row in rows
        ],
        left=3,
    )
    total = _total(model, cost, file.stat().st_size)
    show_facts(_facts(model, cost, total))
    write_results(json, [*rows, total])


def _row(product: ProductCost, layer: Linear | None, model: IntegerModel) -> dict[str, Any]:
    """One matrix product as a flat object; ``bytes`` counts all that the file holds for it."""
    prefix, _, last = product.name.rpartition(".")
    points = {"scores": ("q", "k"), "values": ("map", "v")}.get(last, ()) if layer is None else ()
    names = [f"{prefix}.{point}_" for point in points] or [f"{product.name}."]
    return {
        "layer": product.name,
        "weight_bits": product.left.bits,
        "act_bits": product.right.bits,
        "granularity": f"{_granularity(product.left)} / {_granularity(product.right)}",
        "shape": " x ".join(map(str, product.shape)),
        "parameters": product.parameters,
        "bytes": sum(array.nbytes for name, array in model.tensors.items() if name.startswith(tuple(names))),
        "entropy": None if layer is None else code_entropy(layer.weight.codes()),
        "multiplies": product.multiplies,
    }


def _granularity(spec: QuantSpec) -> str:
    offset = "" if spec.offset is None else f" + {granularity_name(spec.offset)}"
    return granularity_name(spec.scale) + offset


def _total(model: IntegerModel, cost: ModelCost, size: int) -> dict[str, Any]:
    weight_bits, act_bits = model.block_bits()
    return {
        "layer": "total",
        "model": model.name,
        "weight_bits": weight_bits,
        "act_bits": act_bits,
        "parameters": cost.parameters,
        "bytes": sum(array.nbytes for array in model.tensors.values()),
        "file_bytes": size,
        "multiplies": cost.multiplies,
        **{f"multiplies_{bits}_bit": multiplies for bits, multiplies in cost.multiplies_by_bits.items()},
        "theoretical_speed_up": cost.speed_up,
        **{key: value for key, value in model.provenance.items() if isinstance(value, (int, float, str))},
    }


def _facts(model: IntegerModel, cost: ModelCost, total: dict[str, Any]) -> dict[str, object]:
    a, provenance = model.architecture, model.provenance
    by_bits = ", ".join(f"{count(n)} at {bits} bits" for bits, n in cost.multiplies_by_bits.items())
    shown = ", ".join(model.classes[:_SHOWN_CLASSES]) + (", .." if len(model.classes) > _SHOWN_CLASSES else "")
    size = model.preprocessing.input_size
    return {
        "model": f"{model.name}: {a.depth} blocks, {a.embed_dim} wide, {a.num_heads} heads, {a.num_tokens} tokens"
        + (", IRM" if model.header["rectify_eps"] is not None else ""),
        "parameters": f"{count(cost.parameters)} of the float model",
        "file": f"{count(total['file_bytes'])} bytes, {4 * cost.parameters / total['file_bytes']:.1f} x smaller than float32",
        "multiplies": f"{count(cost.multiplies)} an image: {by_bits}",
        "speed-up": f"{cost.speed_up:.2f} x in theory ({SPEED_UP_DEFINITION})",
        "input": f"{size[0]} x {size[1]} x {size[2]}, crop {model.preprocessing.crop_pct:g} ({model.preprocessing.crop_mode}), "
        f"{model.preprocessing.interpolation}",
        "classes": f"{len(model.classes)}: {shown}",
        **{key: value for key, value in provenance.items() if not isinstance(value, dict)},
        **{f"{key} of": _pairs(value) for key, value in provenance.items() if isinstance(value, dict) and key == "versions"},
    }


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
