"""``qvit eval``: top-1 accuracy of a frozen file or of a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvit.cli import options
from qvit.cli.agreement import show_agreement
from qvit.cli.checkpoints import INTEGER_SUFFIX, checkpoint_in
from qvit.cli.images import device_of, name_of, open_evaluation
from qvit.cli.results import write_results
from qvit.cli.show import count, progress, show_facts
from qvit.errors import InputError

if TYPE_CHECKING:
    import torch

    from qvit.engines import Runner
    from qvit.preprocessing import Preprocessing

Predict = Callable[["torch.Tensor"], "torch.Tensor"]


def command(
    file: Annotated[Path, typer.Argument(help="A .qvit file, a checkpoint, or the folder of a run.")],
    data: options.EvaluationData,
    limit: options.Limit = None,
    batch: options.Batch = 32,
    workers: options.Workers = 0,
    engine: options.Engine = "reference",
    device: options.Device = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Also compare a .qvit file with the checkpoint (or run) that it was frozen from."),
    ] = None,
    json: options.Json = None,
) -> None:
    """Measure the top-1 accuracy of a frozen file or a checkpoint.

    A .qvit file is run on its integers. A quantized checkpoint is run as it was trained, in floating point.

    Example:

        qvit eval deit_small_w4a4.qvit --data /data/imagenet --against runs/deit_small_w4a4
    """
    integers = file.suffix == INTEGER_SUFFIX
    if against is not None and not integers:
        raise InputError(f"--against compares a .qvit file with its checkpoint, and {file} is none.")
    runner = _load_integers(file, engine, device) if integers else None

    from qvit.training.evaluate import evaluate

    target = device_of(device)
    if runner is not None:
        predict, classes, preprocessing, facts = _of_integers(runner, file)
    else:
        predict, classes, preprocessing, facts = _of_checkpoint(file, target)
    source, loader = open_evaluation(data, classes, preprocessing, batch, limit, workers)
    start = time.perf_counter()
    # Integer engines move the images themselves, so the counting stays on the CPU.
    result = evaluate(predict, progress(loader, len(loader), "evaluating"), "cpu" if integers else target)
    seconds = time.perf_counter() - start
    accuracy = "integer_top1" if integers else "fake_top1" if facts["weight_bits"] < 32 else "float_top1"
    row = {
        **facts,
        "data": name_of(data),
        accuracy: result.top1,
        "images": result.images,
        "batch": batch,
        "images_per_s": result.images / seconds,
    }
    show_facts(
        {
            "model": f"{facts['model']}, weights {facts['weight_bits']} bits, activations {facts['act_bits']} bits",
            "top-1": f"{result.top1:.2f} % ({accuracy.removesuffix('_top1').replace('fake', 'fake-quantized')})",
            "images": f"{result.images} of {len(source)} in {row['data']}",
            "time": f"{seconds:.1f} s, {row['images_per_s']:.1f} images/s, reading them included",
            **({"file": f"{count(facts['file_bytes'])} bytes"} if integers else {}),
        }
    )
    if list(classes) != list(source.classes):
        print("note: the classes have other names in the model than in the data; they are matched in sorted order")
    if against is not None and runner is not None:
        measured = _compare(runner, checkpoint_in(against), progress(loader, len(loader), "comparing"), target)
        show_agreement(measured)
        row |= measured.to_row()
    write_results(json, [row])


def _load_integers(file: Path, engine: str, device: str | None) -> Runner:
    """The frozen file on its engine; a damaged file is refused before PyTorch is asked for."""
    from qvit.engines import Runner, create_engine
    from qvit.integer.model import IntegerModel

    model = IntegerModel.load(file)
    return Runner(model, create_engine(model, engine, device_of(device)))


def _of_integers(runner: Runner, file: Path) -> tuple[Predict, Sequence[str], Preprocessing, dict[str, Any]]:
    model = runner.model
    weight_bits, act_bits = model.block_bits()
    facts = {
        "model": model.name,
        "weight_bits": weight_bits,
        "act_bits": act_bits,
        "engine": runner.engine.name,
        "file_bytes": file.stat().st_size,
    }
    return runner, model.classes, model.preprocessing, facts  # type: ignore[return-value]


def _of_checkpoint(file: Path, device: str) -> tuple[Predict, Sequence[str], Preprocessing, dict[str, Any]]:
    from qvit.training.checkpoint import load_model

    model, metadata = load_model(checkpoint_in(file))
    spec = metadata.student.spec if metadata.student else None
    facts = {
        "model": metadata.architecture.name,
        "method": metadata.recipe.get("method"),
        "weight_bits": spec.weight_bits if spec else 32,
        "act_bits": spec.act_bits if spec else 32,
    }
    return model.to(device), metadata.classes, metadata.preprocessing, facts


def _compare(runner: Runner, checkpoint: Path, batches: Any, device: str) -> Any:
    """The agreement of the integers with the checkpoint's fake-quantized graph."""
    from qvit.analyze.agreement import agreement
    from qvit.integer.freeze import round_to_half
    from qvit.training.checkpoint import load_student

    student, _ = load_student(checkpoint)
    round_to_half(student)
    return agreement(student.to(device), runner.engine, batches)
