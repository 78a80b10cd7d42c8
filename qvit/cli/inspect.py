"""``qvit inspect``: what a model costs. Needs no PyTorch for a ``.qvit`` file."""

from __future__ import annotations

from statistics import mode
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvit.analyze.cost import BIT_OPERATIONS_DEFINITION, SPEED_UP_DEFINITION, ModelCost, ProductCost, model_cost
from qvit.analyze.entropy import code_entropy
from qvit.analyze.products import LINEAR
from qvit.analyze.roofline import HARDWARE, estimate
from qvit.cli import options
from qvit.cli.estimates import estimate_row, hardware_of, show_estimates
from qvit.cli.results import write_results
from qvit.cli.show import count, shape, show_facts, show_table
from qvit.cli.subject import Subject, Wish, find
from qvit.spec import QuantSpec, granularity_name

if TYPE_CHECKING:
    from qvit.integer.ops import Linear

_SHOWN_CLASSES = 10
_CEILINGS = ", ".join(name for hardware in HARDWARE.values() for name in hardware.names())
# What stands under the first table.
_COLUMNS = {
    "bits, scales": "of weight / input; of q / k; of the softmax map / v",
    "M x K x N": "rows of an image x summed index x columns; attention: heads (x windows) x tokens, all heads in one product",
    "multiplies": "M K N multiply-accumulates an image",
    "bit ops": f"multiplies x bits x bits; of the model: {BIT_OPERATIONS_DEFINITION}",
    "bytes": "packed codes, scales, offsets and bias in the file; without a file the packed codes of the weight alone",
    "entropy": "bits that a weight's code carries, at most its width; only of a .qvit file",
}


def command(
    target: Annotated[
        str, typer.Argument(help="A .qvit file, a checkpoint or the folder of a run, or timm's name of a model.")
    ],
    bits: Annotated[
        int | None, typer.Option("--bits", help="For a float model: bits of weights and activations, 2 to 8; 4 by default.")
    ] = None,
    weight_bits: Annotated[int | None, typer.Option("--weight-bits", help="Bits of weights, where not --bits.")] = None,
    act_bits: Annotated[int | None, typer.Option("--act-bits", help="Bits of activations, where not --bits.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--override", help="pattern=bits for some layers, such as '*.mlp.fc2=8'; may be given again."),
    ] = None,
    residual: Annotated[
        str | None, typer.Option("--residual", help="For a float model: type of the residual stream, float32 or float16.")
    ] = None,
    model_arg: Annotated[list[str] | None, typer.Option("--model-arg", help=options.MODEL_ARGUMENTS)] = None,
    batch: Annotated[int, typer.Option("--batch", help="Images of the roofline estimate.")] = 1,
    threads: Annotated[int, typer.Option("--threads", help="Cores of the CPU's roofline estimate.")] = 1,
    ceiling: Annotated[
        list[str] | None,
        typer.Option(
            "--ceiling",
            help=f"name=value, another machine's multiplies or bytes a second for the estimate; names: {_CEILINGS}; "
            "may be given again.",
        ),
    ] = None,
    json: options.Json = None,
) -> None:
    """Show what a model costs, product by product, and what is in a frozen file.

    A table of its matrix products: bits, granularities, shape, multiplies, bytes, entropy of the codes; then totals, multiplies
    by bit width (attention's q k^T and map times v included), the paper's theoretical speed-up, a roofline estimate for each
    engine, and of files their classes and provenance. The tables say what every column means; docs/cost-model.md says how
    it is counted. Needs no PyTorch for a .qvit file.

    Example:

        qvit inspect deit_small_w4a4.qvit

        qvit inspect deit_small_patch16_224 --bits 3 --threads 2 --batch 8
    """
    hardware = hardware_of(ceiling or [])
    subject = find(target, Wish(bits, weight_bits, act_bits, override or (), model_arg or (), residual))
    cost = model_cost(subject.architecture, subject.specs)
    estimates = [estimate(cost, item, batch, threads, subject.residual) for item in hardware]
    layers = {layer.name: layer for layer in subject.model.linears()} if subject.model else {}
    rows = [_row(product, layers.get(product.name), subject) for product in cost.products]
    _show_products(subject, rows)
    total = _total(subject, cost)
    show_facts(_facts(subject, cost, total))
    show_estimates(estimates)
    write_results(json, [*rows, total, *(estimate_row(item, cost, total) for item in estimates)])


def _row(product: ProductCost, layer: Linear | None, subject: Subject) -> dict[str, Any]:
    """One matrix product as a flat object; ``bytes`` counts all that the file holds for it."""
    own = product.product
    row = {
        "layer": product.name,
        "weight_bits": product.left.bits,
        "act_bits": product.right.bits,
        "granularity": f"{_granularity(product.left)} / {_granularity(product.right)}",
        "shape": " x ".join(map(str, product.shape)),
        "m": own.rows,
        "k": own.inner,
        "n": own.columns,
        "parameters": product.parameters,
        "multiplies": product.multiplies,
        "bit_operations": product.bit_operations,
        "bytes": product.weight_bytes,
        "entropy": None if layer is None else code_entropy(layer.weight.codes()),
    }
    if subject.model is not None:
        names = (f"{product.name}.",) if own.kind == LINEAR else tuple(f"{point}_" for point in own.points)
        row["bytes"] = sum(array.nbytes for name, array in subject.model.tensors.items() if name.startswith(names))
    return row


def _granularity(spec: QuantSpec) -> str:
    offset = "" if spec.offset is None else f" + {granularity_name(spec.offset)}"
    return granularity_name(spec.scale) + offset


def _show_products(subject: Subject, rows: list[dict[str, Any]]) -> None:
    columns = ["layer", "bits", "scales (+ offsets)", "M x K x N", "multiplies", "bit ops", "bytes", "entropy"]
    show_table(
        subject.title,
        columns,
        [
            (
                row["layer"],
                f"{row['weight_bits']}/{row['act_bits']}",
                row["granularity"],
                f"{row['m']} x {row['k']} x {row['n']}",
                count(row["multiplies"]),
                count(row["bit_operations"]),
                count(row["bytes"]),
                "" if row["entropy"] is None else f"{row['entropy']:.2f}",
            )
            for row in rows
        ],
        left=3,
    )
    show_facts(_COLUMNS)
    print()


def _total(subject: Subject, cost: ModelCost) -> dict[str, Any]:
    inner = [product for product in cost.products if product.product.kind == LINEAR and not product.product.edge]
    total = {
        "layer": "total",
        "model": subject.architecture.name,
        "weight_bits": mode(product.left.bits for product in inner),
        "act_bits": mode(product.right.bits for product in inner),
        "residual": subject.residual,
        "parameters": cost.parameters,
        "weight_bytes": cost.weight_bytes,
        "multiplies": cost.multiplies,
        **{f"multiplies_{bits}_bit": multiplies for bits, multiplies in cost.multiplies_by_bits.items()},
        "bit_operations": cost.bit_operations,
        "theoretical_speed_up": cost.speed_up,
        **{key: value for key, value in subject.provenance.items() if isinstance(value, (int, float, str))},
    }
    if subject.model is not None:
        total["bytes"] = sum(array.nbytes for array in subject.model.tensors.values())
        total["file_bytes"] = subject.file_bytes
    return total


def _facts(subject: Subject, cost: ModelCost, total: dict[str, Any]) -> dict[str, object]:
    a, provenance, preprocessing = subject.architecture, subject.provenance, subject.preprocessing
    by_bits = ", ".join(f"{count(n)} at {bits} bits" for bits, n in cost.multiplies_by_bits.items())
    shown = ", ".join(subject.classes[:_SHOWN_CLASSES]) + (", .." if len(subject.classes) > _SHOWN_CLASSES else "")
    size = preprocessing.input_size
    facts: dict[str, object] = {
        "model": f"{a.name}: {shape(a)}" + (", IRM" if subject.rectify else ""),
        "parameters": f"{count(cost.parameters)} of the float model, without those of IRM and of the quantizers",
        "weights": f"{count(cost.weight_bytes)} bytes of packed codes",
        "multiplies": f"{count(cost.multiplies)} an image, by the wider operand: {by_bits}",
        "bit ops": f"{count(cost.bit_operations)} an image",
        "residual": f"the residual stream is {subject.residual}",
        "speed-up": f"{cost.speed_up:.2f} x in theory ({SPEED_UP_DEFINITION})",
        "input": f"{size[0]} x {size[1]} x {size[2]}, crop {preprocessing.crop_pct:g} ({preprocessing.crop_mode}), "
        f"{preprocessing.interpolation}",
    }
    if subject.file_bytes is not None:
        smaller = 4 * cost.parameters / subject.file_bytes
        facts["file"] = f"{count(subject.file_bytes)} bytes, {smaller:.1f} x smaller than float32"
    if subject.classes:
        facts["classes"] = f"{len(subject.classes)}: {shown}"
    said = {key: value for key, value in provenance.items() if not isinstance(value, dict)}
    facts |= {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in said.items()}
    if isinstance(versions := provenance.get("versions"), dict):
        facts["versions of"] = ", ".join(f"{key} {value}" for key, value in versions.items())
    return facts
