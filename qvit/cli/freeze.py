"""``qvit freeze``: from a checkpoint to a ``.qvit`` file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import typer

from qvit.analyze.products import has_mixed_widths
from qvit.cli import options
from qvit.cli.agreement import show_agreement
from qvit.cli.budget import budget_facts
from qvit.cli.checkpoints import INTEGER_SUFFIX, checkpoint_in, class_names
from qvit.cli.images import as_tensors, device_of, name_of, open_evaluation
from qvit.cli.results import write_results
from qvit.cli.show import count, progress, show_facts, widths
from qvit.errors import InputError, TrainingError


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A quantized checkpoint, or the folder of a run (its best one).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .qvit file to write.")],
    data: options.OptionalEvaluationData = None,
    limit: options.Limit = None,
    batch: options.Batch = 32,
    workers: options.Workers = None,
    engine: Annotated[str, typer.Option("--engine", help="What runs the integers that are verified.")] = "reference",
    device: options.Device = None,
    classes: Annotated[
        Path | None, typer.Option("--classes", help="Text file with the names of the classes, one a line.")
    ] = None,
    json: options.Json = None,
) -> None:
    """Turn a trained checkpoint into integers.

    Scales, offsets and norms are rounded to float16. With --data, verifies first that the integers compute what the rounded
    model computes: equal codes, logits and top-1 on these images; and says how often the top-1 is still that of training.

    Example:

        qvit freeze runs/deit_small_w4a4 -o deit_small_w4a4.qvit --data /data/imagenet --limit 500
    """
    if output.suffix != INTEGER_SUFFIX:
        raise InputError(f"{output} is no .qvit file: end its name with .qvit.")

    import qvit
    from qvit.engines import create_engine
    from qvit.training.checkpoint import load_student
    from qvit.training.provenance import provenance_of

    student, metadata = load_student(checkpoint_in(checkpoint))
    provenance = provenance_of(metadata)
    names = class_names(classes, metadata.classes)
    trained = copy.deepcopy(student).eval() if data else None  # freezing rounds the student
    model = qvit.freeze(student, names, provenance)
    row: dict[str, Any] = {"model": model.name, "method": metadata.recipe.get("method")}
    row["weight_bits"], row["act_bits"] = model.block_bits()
    row["residual"] = model.residual
    row["fake_top1"] = provenance.get("fake_top1")
    measured = None
    if data and trained is not None:
        from qvit.analyze.agreement import agreement

        target = device_of(device)
        _, batches = open_evaluation(data, names, model.preprocessing, batch, limit, workers)
        # The other engines know their own device, and say themselves what they do not run on.
        runner = create_engine(model, engine, target if engine == "reference" else device)
        shown = progress(batches, len(batches), "comparing")
        measured = agreement(student.to(target), runner, as_tensors(shown, model.preprocessing), trained.to(target))
        if not measured.holds:
            raise TrainingError(
                f"The integers do not compute what was trained ({measured.worst_codes:.3f} % of the codes are equal at "
                f"{measured.worst_point}, the top-1 on {measured.top1:.2f} % of {measured.images} images): {output} was not "
                "written; please report this."
            )
        row |= {"engine": engine, "data": name_of(data), "images": measured.images, **measured.to_row()}
    row["file_bytes"] = model.save(output)
    show_facts(
        {
            "model": f"{model.name}, {widths(*model.block_bits(), has_mixed_widths(model.architecture, model.specs))}",
            "file": f"{output}, {count(row['file_bytes'])} bytes",
            **budget_facts(metadata.recipe, row["file_bytes"]),
        }
    )
    if measured is not None:
        show_agreement(measured)
    write_results(json, [row])
