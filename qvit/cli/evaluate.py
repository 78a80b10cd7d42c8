"""``qvit eval``: top-1 accuracy of a frozen file or of a checkpoint."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from qvit.analyze.products import has_mixed_widths, products_of, specs_of
from qvit.cli import options
from qvit.cli.agreement import show_agreement
from qvit.cli.checkpoints import INTEGER_SUFFIX, checkpoint_in
from qvit.cli.engines import open_runner
from qvit.cli.images import as_tensors, device_of, name_of, open_evaluation
from qvit.cli.results import write_results
from qvit.cli.show import count, progress, show_facts, widths
from qvit.errors import InputError

if TYPE_CHECKING:
    from qvit.accuracy import Evaluation
    from qvit.engines import Runner


def command(
    file: Annotated[Path, typer.Argument(help="A .qvit file, a checkpoint, or the folder of a run.")],
    data: options.EvaluationData,
    limit: options.Limit = None,
    batch: options.Batch = 32,
    workers: options.Workers = None,
    engine: options.Engine = None,
    device: options.Device = None,
    threads: options.Threads = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Also compare a .qvit file with the checkpoint (or run) that it was frozen from."),
    ] = None,
    json: options.Json = None,
) -> None:
    """Measure the top-1 accuracy of a frozen file or a checkpoint.

    A .qvit file is run on its integers, images being read while it computes. A quantized checkpoint is run as it was trained,
    in floating point.

    Example:

        qvit eval deit_small_w4a4.qvit --data /data/imagenet --against runs/deit_small_w4a4
    """
    integers = file.suffix == INTEGER_SUFFIX
    if against is not None and not integers:
        raise InputError(f"--against compares a .qvit file with its checkpoint, and {file} is none.")
    for option, value in (("--engine", engine), ("--threads", threads)):
        if value is not None and not integers:
            raise InputError(
                f"{option} is for the integers of a .qvit file, and {file} is none: freeze it, or leave {option} out."
            )
    subject = _Integers(open_runner(file, engine, device, threads), file) if integers else _Checkpoint(file, device)
    classes, preprocessing, facts = subject.classes, subject.preprocessing, subject.facts
    source, batches = open_evaluation(data, classes, preprocessing, batch, limit, workers)
    start = time.perf_counter()
    result = subject.evaluate(progress(batches, len(batches), "evaluating"))
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
            "model": f"{facts['model']}, {widths(facts['weight_bits'], facts['act_bits'], subject.mixed)}",
            "top-1": f"{result.top1:.2f} % ({accuracy.removesuffix('_top1').replace('fake', 'fake-quantized')})",
            "images": f"{result.images} of {len(source)} in {row['data']}",
            "time": f"{seconds:.1f} s, {row['images_per_s']:.1f} images/s, reading them included",
            **({"file": f"{count(facts['file_bytes'])} bytes"} if integers else {}),
        }
    )
    if list(classes) != list(source.classes):
        print("note: the classes have other names in the model than in the data; they are matched in sorted order")
    if against is not None and isinstance(subject, _Integers):
        shown = progress(batches, len(batches), "comparing")
        measured = _compare(subject.runner, checkpoint_in(against), as_tensors(shown, preprocessing), device_of(device))
        show_agreement(measured)
        row |= measured.to_row()
    write_results(json, [row])


class _Integers:
    """A frozen file on its engine; needs PyTorch only where the engine does."""

    def __init__(self, runner: Runner, file: Path) -> None:
        self.runner = runner
        self.classes: Sequence[str] = runner.model.classes
        self.preprocessing = runner.model.preprocessing
        self.mixed = has_mixed_widths(runner.model.architecture, runner.model.specs)
        weight_bits, act_bits = runner.model.block_bits()
        self.facts: dict[str, Any] = {
            "model": runner.model.name,
            "weight_bits": weight_bits,
            "act_bits": act_bits,
            "residual": runner.model.residual,
            "engine": runner.engine.name,
            "file_bytes": file.stat().st_size,
        }

    def evaluate(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Evaluation:
        from qvit.accuracy import top1_of_arrays

        return top1_of_arrays(self.runner, batches)  # type: ignore[arg-type]


class _Checkpoint:
    """A float or quantized checkpoint in PyTorch."""

    def __init__(self, file: Path, device: str | None) -> None:
        from qvit.training.checkpoint import load_model

        self.device = device_of(device)
        self.model, metadata = load_model(checkpoint_in(file))
        self.classes: Sequence[str] = metadata.classes
        self.preprocessing = metadata.preprocessing
        spec = metadata.student.spec if metadata.student else None
        a = metadata.architecture
        self.mixed = spec is not None and has_mixed_widths(a, specs_of(products_of(a), spec))
        self.facts: dict[str, Any] = {
            "model": metadata.architecture.name,
            "method": metadata.recipe.get("method"),
            "weight_bits": spec.weight_bits if spec else 32,
            "act_bits": spec.act_bits if spec else 32,
            "residual": spec.residual if spec else "float32",
        }

    def evaluate(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Evaluation:
        from qvit.training.evaluate import evaluate

        return evaluate(self.model.to(self.device), as_tensors(batches, self.preprocessing), self.device)


def _compare(runner: Runner, checkpoint: Path, batches: Any, device: str) -> Any:
    """The agreement of the integers with the checkpoint's fake-quantized graph."""
    from qvit.analyze.agreement import agreement
    from qvit.integer.freeze import round_to_half
    from qvit.training.checkpoint import load_student

    student, _ = load_student(checkpoint)
    trained = copy.deepcopy(student).eval()
    round_to_half(student)
    return agreement(student.to(device), runner.engine, batches, trained.to(device))
