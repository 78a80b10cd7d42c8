"""``qvit quantize``: calibration alone, without training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvit.cli import options
from qvit.cli.checkpoints import INTEGER_SUFFIX, checkpoint_in, class_names
from qvit.cli.images import at_least_one, device_of, location_of, name_of
from qvit.cli.results import write_results
from qvit.cli.show import count, progress, show_facts
from qvit.cli.spec_options import arguments_of, numbers, spec_of
from qvit.errors import InputError
from qvit.report_file import versions

if TYPE_CHECKING:
    from qvit.preprocessing import Preprocessing
    from qvit.training.checkpoint import Metadata

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
    model_arg: Annotated[
        list[str] | None, typer.Option("--model-arg", help="key=value for timm, such as patch_size=14; may be given again.")
    ] = None,
    bits: Annotated[int, typer.Option("--bits", help="Bits of weights and activations, 2 to 8.")] = 4,
    weight_bits: Annotated[int | None, typer.Option("--weight-bits", help="Bits of weights, where not --bits.")] = None,
    act_bits: Annotated[int | None, typer.Option("--act-bits", help="Bits of activations, where not --bits.")] = None,
    rectify: Annotated[bool, typer.Option("--rectify/--no-rectify", help="Insert IRM on q and k.")] = True,
    override: Annotated[
        list[str] | None,
        typer.Option("--override", help="pattern=bits for some layers, such as '*.mlp.fc2=8'; may be given again."),
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
    """
    if output.suffix not in (INTEGER_SUFFIX, ".safetensors"):
        raise InputError(f"{output} is neither a .qvit nor a .safetensors file: end its name with one of them.")
    spec = spec_of(bits, weight_bits, act_bits, rectify, override or [])
    at_least_one("--images", images)

    import numpy as np

    import qvit
    from qvit.sources import open_source
    from qvit.training.data import check_classes, evaluation_loader

    target = device_of(device)
    source = open_source(location_of(data), "train")
    images_as = {"crop_pct": crop_pct, "mean": numbers(mean, "--mean"), "std": numbers(std, "--std")}
    original, preprocessing, trained = _float_model(model, checkpoint, model_arg or [], images_as)
    check_classes(source, original.num_classes, "calibration")
    names = class_names(classes, trained.classes if trained else source.classes)
    student: Any = qvit.quantize(original, spec=spec, preprocessing=preprocessing).to(target)
    drawn = np.random.default_rng(seed).permutation(len(source))[:images].tolist()
    start = time.perf_counter()
    loader = evaluation_loader(source, preprocessing, _BATCH, indices=drawn)
    qvit.calibrate(student, progress(loader, len(loader), "calibrating"), images=images)
    seconds = time.perf_counter() - start

    facts = {"method": "calibration", "data": name_of(data), "calibration_images": len(drawn), "seed": seed}
    float_top1 = trained.metrics.get("top1") if trained else None
    size = _save(student, output, names, facts, {} if float_top1 is None else {"float_top1": float_top1})
    parameters = sum(p.numel() for p in original.parameters())
    row = {
        "model": student.qvit.architecture.name,
        "data": name_of(data),
        "method": "calibration",
        "weight_bits": spec.weight_bits,
        "act_bits": spec.act_bits,
        "rectify": spec.rectify,
        "seed": seed,
        "float_top1": float_top1,
        "images": len(drawn),
        "calibration_seconds": seconds,
        "file_bytes": size,
        "float_bytes": 4 * parameters,
    }
    show_facts(
        {
            "model": row["model"],
            "bits": f"weights {spec.weight_bits}, activations {spec.act_bits}, first and last layer {spec.edge_bits}",
            "calibrated": f"on {len(drawn)} images of {row['data']} in {seconds:.1f} s",
            "file": f"{output}, {count(size)} bytes ({4 * parameters / size:.1f} x smaller than float32)",
        }
    )
    write_results(json, [row])


def _float_model(
    name: str | None, checkpoint: Path | None, arguments: list[str], images_as: dict[str, Any]
) -> tuple[Any, Preprocessing, Metadata | None]:
    """The float model, the preprocessing of its images and what its checkpoint says of itself, if it is one of ours."""
    from qvit.training.checkpoint import is_checkpoint, load_model
    from qvit.training.models import adjusted, build_model
    from qvit.training.recipe import Recipe

    path = None if checkpoint is None else checkpoint_in(checkpoint)
    # Through the recipe, whose error messages say what is wrong with a value.
    described: dict[str, Any] = {"data": images_as}
    if name is not None:
        described["model"] = {"name": name, "args": arguments_of(arguments), "pretrained": path is None, "checkpoint": path}
    recipe = Recipe.from_dict(described)
    known = path is not None and is_checkpoint(path)
    if recipe.model is not None:
        model, preprocessing = build_model(recipe.model, recipe.data)
        return model, preprocessing, load_model(path)[1] if known and path else None
    if path is None:
        raise InputError("There is no model to quantize: name a timm model, or a checkpoint with --checkpoint.")
    if not known:
        raise InputError(f"{path} does not say which model it belongs to: name the timm model before it.")
    model, metadata = load_model(path)
    return model, adjusted(metadata.preprocessing, recipe.data), metadata


def _save(student: Any, output: Path, classes: list[str], facts: dict[str, Any], metrics: dict[str, float]) -> int:
    """Writes integers or a checkpoint, by the file's ending; returns its size in bytes."""
    if output.suffix == INTEGER_SUFFIX:
        import qvit

        return qvit.freeze(student, classes, {**facts, **metrics, "versions": versions()}).save(output)
    from qvit.training.checkpoint import Metadata, save_checkpoint

    recipe = {**facts, "data": {"train": facts["data"]}}
    save_checkpoint(output, student, Metadata.of(student, student.qvit.preprocessing, classes, recipe, metrics=metrics))
    return output.stat().st_size
