"""``qvit quantize``: calibration alone, without training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvit.cli import options
from qvit.cli.budget import budget_of, check_kept, show_plan, tracked
from qvit.cli.checkpoints import INTEGER_SUFFIX, class_names
from qvit.cli.float_model import float_model
from qvit.cli.images import at_least_one, device_of, location_of, name_of
from qvit.cli.results import command_line, write_results
from qvit.cli.show import count, progress, show_facts
from qvit.cli.spec_options import numbers, spec_of
from qvit.errors import InputError
from qvit.report_file import versions

if TYPE_CHECKING:
    from qvit.analyze.budget import Budget

_BATCH = 16


def command(
    data: options.CalibrationData,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write: .qvit integers or a .safetensors checkpoint.")],
    model: Annotated[
        str | None, typer.Argument(help="timm's name of the model; not needed with a checkpoint that qvit wrote.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Weights: a state dict (.safetensors, .pth) or a float run; else timm's pretrained."),
    ] = None,
    model_arg: Annotated[list[str] | None, typer.Option("--model-arg", help=options.MODEL_ARGUMENTS)] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="Bits of weights and activations, 2 to 8; 4 by default.")] = None,
    weight_bits: Annotated[int | None, typer.Option("--weight-bits", help="Bits of weights, where not --bits.")] = None,
    act_bits: Annotated[int | None, typer.Option("--act-bits", help="Bits of activations, where not --bits.")] = None,
    rectify: Annotated[bool, typer.Option("--rectify/--no-rectify", help="Insert IRM on q and k.")] = True,
    residual: Annotated[
        str, typer.Option("--residual", help="Of the residual stream: float32, or float16, which is less for a GPU to move.")
    ] = "float32",
    override: Annotated[
        list[str] | None,
        typer.Option("--override", help="pattern=bits for some layers, such as '*.mlp.fc2=8'; may be given again."),
    ] = None,
    budget_mb: Annotated[
        float | None,
        typer.Option("--budget-mb", help="Choose the bits layer by layer: the .qvit file has at most so many MB (10^6 bytes)."),
    ] = None,
    budget_bops: Annotated[
        float | None,
        typer.Option(
            "--budget-bops", help="Choose the bits layer by layer: at most so many bit operations an image (qvit inspect)."
        ),
    ] = None,
    sensitivities: Annotated[
        Path | None,
        typer.Option("--sensitivities", help="File of a budget's measurements: read where it exists, else written."),
    ] = None,
    images: Annotated[int, typer.Option("--images", help="Calibration images, drawn at random.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw.")] = 0,
    crop_pct: Annotated[float | None, typer.Option("--crop-pct", help="Share of the resized image that is kept.")] = None,
    mean: Annotated[
        str | None,
        typer.Option("--mean", help="Of the images, one number a channel (0.485,0.456,0.406), where not the model's."),
    ] = None,
    std: Annotated[
        str | None, typer.Option("--std", help="Of the images, one number a channel, where not the model's.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option("--classes", help="Text file with the names of the classes, one a line.")
    ] = None,
    device: options.Device = None,
    json: options.Json = None,
) -> None:
    """Quantize a float model by calibration, without training.

    Example:

        qvit quantize deit_small_patch16_224 --bits 8 --no-rectify --data /data/imagenet -o deit_small_w8a8.qvit

    Mixed precision, the bits of every layer chosen by how much the model's answers suffer from them:

        qvit quantize deit_small_patch16_224 --budget-mb 10 --data /data/imagenet -o deit_small_10mb.qvit
    """
    if output.suffix not in (INTEGER_SUFFIX, ".safetensors"):
        raise InputError(f"{output} is neither a .qvit nor a .safetensors file: end its name with one of them.")
    spec = spec_of(bits, weight_bits, act_bits, rectify, override or [], residual)
    budget = budget_of(budget_mb, budget_bops, (bits, weight_bits, act_bits))
    if sensitivities is not None and budget is None:
        raise InputError("--sensitivities belongs to a budget: give --budget-mb or --budget-bops.")
    at_least_one("--images", images)

    import numpy as np

    import qvit
    from qvit.sources import open_source
    from qvit.training.data import check_classes, evaluation_loader

    target = device_of(device)
    source = open_source(location_of(data), "train")
    images_as = {"crop_pct": crop_pct, "mean": numbers(mean, "--mean"), "std": numbers(std, "--std")}
    original, preprocessing, trained = float_model(model, checkpoint, model_arg or [], images_as)
    check_classes(source, original.num_classes, "calibration")
    names = class_names(classes, trained.classes if trained else source.classes)
    drawn = np.random.default_rng(seed).permutation(len(source))[:images].tolist()
    loader = evaluation_loader(source, preprocessing, _BATCH, indices=drawn)
    facts = {"method": "calibration", "data": name_of(data), "calibration_images": len(drawn), "seed": seed}
    facts |= {key: value for key, value in (("budget_mb", budget_mb), ("budget_bops", budget_bops)) if value is not None}
    float_top1 = trained.metrics.get("top1") if trained else None
    metrics = {} if float_top1 is None else {"float_top1": float_top1}
    plan = None
    start = time.perf_counter()
    if budget is not None:
        from qvit.analyze.budget import make_plan

        plan = make_plan(
            budget,
            original.to(target),
            loader,
            spec,
            preprocessing,
            names,
            _provenance(facts, metrics)
            | ({} if output.suffix == INTEGER_SUFFIX else {"metrics": metrics, "recipe": _recipe(facts)}),
            images,
            sensitivities,
            tracked("measuring sensitivities"),
            command_line(),
        )
        spec = plan.spec
    student: Any = qvit.quantize(original, spec=spec, preprocessing=preprocessing).to(target)
    qvit.calibrate(student, progress(loader, len(loader), "calibrating"), images=images)
    seconds = time.perf_counter() - start

    size = _save(student, output, names, facts, metrics, budget)
    parameters = sum(p.numel() for p in original.parameters())
    row = {
        "model": student.qvit.architecture.name,
        "data": name_of(data),
        "method": "calibration",
        "weight_bits": spec.weight_bits,
        "act_bits": spec.act_bits,
        "rectify": spec.rectify,
        "residual": spec.residual,
        "seed": seed,
        "float_top1": float_top1,
        "images": len(drawn),
        "calibration_seconds": seconds,
        "file_bytes": size,
        "float_bytes": 4 * parameters,
    }
    bits_shown = f"weights {spec.weight_bits}, activations {spec.act_bits}, first and last layer {spec.edge_bits}"
    if plan is not None:
        show_plan(plan)
        bits_shown = f"mixed, mostly {spec.weight_bits}; first and last layer {spec.edge_bits}"
        row |= {"budget_mb": budget_mb, "budget_bops": budget_bops, "damage": plan.damage}
        row |= {"bit_operations": plan.bit_operations, **{f"bits of {unit}": width for unit, width in plan.widths.items()}}
    # A checkpoint holds float weights: it is as large as they are.
    smaller = f" ({4 * parameters / size:.1f} x smaller than float32)" if output.suffix == INTEGER_SUFFIX else ""
    show_facts(
        {
            "model": row["model"],
            "bits": bits_shown,
            "calibrated": f"on {len(drawn)} images of {row['data']} in {seconds:.1f} s",
            "file": f"{output}, {count(size)} bytes{smaller}",
        }
    )
    write_results(json, [row])


def _provenance(facts: dict[str, Any], metrics: dict[str, float]) -> dict[str, Any]:
    return {**facts, **metrics, "versions": versions()}


def _recipe(facts: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says instead of a training recipe; a file that is frozen from it takes it over."""
    return {**facts, "data": {"train": facts["data"]}}


def _save(
    student: Any, output: Path, classes: list[str], facts: dict[str, Any], metrics: dict[str, float], budget: Budget | None
) -> int:
    """Writes integers or a checkpoint, by the file's ending; returns its size in bytes."""
    if output.suffix == INTEGER_SUFFIX:
        import qvit

        model = qvit.freeze(student, classes, _provenance(facts, metrics))
        check_kept(budget, model)
        return model.save(output)
    from qvit.training.checkpoint import Metadata, save_checkpoint

    metadata = Metadata.of(student, student.qvit.preprocessing, classes, _recipe(facts), metrics=metrics)
    save_checkpoint(output, student, metadata)
    return output.stat().st_size
