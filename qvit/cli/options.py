"""Options that several commands share, so that they are called the same and mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_IMAGES = "a folder of class folders, a tar file of class folders (give the option again for more files), or 'digits'"

MODEL_ARGUMENTS = "key=value for timm, such as patch_size=14 or depths=[2,2]; may be given again."
Json = Annotated[Path | None, typer.Option("--json", help="Write the results to this file, with versions and hardware.")]
_EVALUATION_HELP = f"Images: {_IMAGES}. Of 'train' and 'val' folders in it, 'val'."
EvaluationData = Annotated[list[str], typer.Option("--data", help=_EVALUATION_HELP)]
OptionalEvaluationData = Annotated[list[str] | None, typer.Option("--data", help=_EVALUATION_HELP)]
CalibrationData = Annotated[
    list[str], typer.Option("--data", help=f"Calibration images: {_IMAGES}. Of 'train' and 'val' folders in it, 'train'.")
]
Limit = Annotated[int | None, typer.Option("--limit", help="Use this many images, evenly spaced; all by default.")]
Batch = Annotated[int, typer.Option("--batch", help="Images that are computed at once.")]
Workers = Annotated[int | None, typer.Option("--workers", help="Threads that read images; one a core by default.")]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="What runs the integers: cpu, cuda (an NVIDIA GPU), or reference (PyTorch, slow). By default cpu, and cuda with "
        "--device cuda; where that cannot run the model, reference, which is said.",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", help="Threads of the cpu engine; one a core by default.")]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda or cuda:1, ..; what runs in PyTorch takes a GPU by default where there is one."),
]
