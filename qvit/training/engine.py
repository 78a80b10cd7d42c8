"""`train` and `fit`: the ways into training, on Hugging Face Accelerate, for one process and for many (``torchrun``)."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from rich.console import Console
from torch import nn

from qvit.errors import InputError, RecipeError, TrainingError
from qvit.spec import ModelSpec
from qvit.training.cascade import FIRST_STAGE, cascade_stages, first_stage_metrics
from qvit.training.checkpoint import LAST, Checkpoint, read_checkpoint
from qvit.training.interrupt import TrainingInterrupted
from qvit.training.logs import RunLog
from qvit.training.loop import TrainingLoop
from qvit.training.memory import is_full
from qvit.training.recipe import Recipe
from qvit.training.result import TrainingResult
from qvit.training.resume import check_same_run
from qvit.training.setup import set_up, spec_of_budget


def train(
    model: nn.Module,
    teacher: nn.Module | None = None,
    recipe: Recipe | str | Path = "digits",
    data: str | Path | None = None,
    output: str | Path = "runs/train",
    resume: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Trains a model that is at hand; `fit` says what happens.

    Args:
        model: quantized (trained in place, and calibrated first if it is not), or float: then it is quantized as the recipe
            says, or trained in place if the recipe's method is ``float``.
        teacher: float; by default the recipe's, or the float ``model``.
        recipe: a `Recipe`, the name of one that comes with the package, or the path of a file.
        data: a folder or tar file with training and validation images, or ``digits``; by default the recipe's.
        output: folder of the run.
        resume: go on with the run in ``output``, if there is one.
        progress: print what happens.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if data is not None:
        both = recipe.data.model_copy(update={"train": str(data), "val": None})
        recipe = recipe.model_copy(update={"data": both})
    return fit(recipe, output, model=model, teacher=teacher, resume=resume, progress=progress)


def fit(
    recipe: Recipe,
    output: str | Path,
    *,
    model: nn.Module | None = None,
    teacher: nn.Module | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Trains what a recipe describes, in this process and those that were launched with it.

    With ``cascade.share``, in two stages (`qvit.training.cascade`).

    Args:
        recipe: what to do.
        output: folder of the run, made if need be.
        model: in place of the recipe's.
        teacher: in place of the recipe's.
        resume: go on from ``last.safetensors`` in ``output``; from the beginning if there is none.
        progress: print a line an epoch, and a progress bar on a terminal.

    Raises:
        QvitError: recipe, images, weights or checkpoint do not fit; nothing has been written.
        TrainingError: the loss is not a number, or disk or GPU memory is full; the last good checkpoint is kept.
        TrainingInterrupted: Ctrl-C; the state is saved.
    """
    if recipe.quantized and recipe.cascade.share and not recipe.cascades and recipe.quant.start_from is None:
        _say(f"note: no first stage, since the student has no fewer bits than cascade.bits={recipe.cascade.bits}", progress)
    fit_stages = _fit_cascade if recipe.cascades else _fit_stage
    return fit_stages(recipe, Path(output), model, teacher, resume, progress)


def _fit_stage(
    recipe: Recipe,
    output: Path,
    model: nn.Module | None,
    teacher: nn.Module | None,
    resume: bool,
    progress: bool,
    metrics: Mapping[str, float] | None = None,
    spec: ModelSpec | None = None,
) -> TrainingResult:
    """A run that is no cascade, or a stage of one; ``metrics`` are those that it begins with, ``spec`` is as in `set_up`."""
    with _out_of_memory():
        loop = open_loop(recipe, output, model=model, teacher=teacher, resume=resume, progress=progress, spec=spec)
        loop.metrics |= metrics or {}
        with RunLog(loop.output, loop.step, loop.total_steps, loop.accelerator.is_main_process, progress) as log:
            return loop.run(log)


def _say(line: str, progress: bool) -> None:
    if progress and os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)


def _fit_cascade(
    recipe: Recipe, output: Path, model: nn.Module | None, teacher: nn.Module | None, resume: bool, progress: bool
) -> TrainingResult:
    """Both stages of a cascade, one after the other; where the second has a checkpoint, nothing is left of the first to do."""
    if hasattr(model, "qvit"):
        raise RecipeError("A cascade starts from a float model, and this one is quantized: set cascade.share to 0.")
    begins, ends = cascade_stages(recipe, output)
    if (output / LAST).exists():
        return _fit_stage(ends, output, model, teacher, resume, progress)
    first_output = output / FIRST_STAGE
    if (first_output / LAST).exists() and not resume:
        raise _taken(output)
    spec = None
    if recipe.quant.has_budget:  # it may be one that cannot be met, which nobody wants to know after the first stage
        with _out_of_memory():
            _check_place(output)
            spec = spec_of_budget(recipe, _accelerator(recipe), model, progress)
    _say(f"first stage: {recipe.cascade.bits} bits, {begins.schedule.epochs} of {recipe.schedule.epochs} epochs", progress)
    try:
        first = _fit_stage(begins, first_output, model, teacher, resume, progress)
    except TrainingInterrupted:
        raise TrainingInterrupted(f"Stopped in the first stage of the cascade: resume the run in {output} to go on.") from None
    metrics, peak_gb = first_stage_metrics(first), first.peak_gb
    del first
    # The loop is gone but for cycles, which hold its model and the memory of a recorded step.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    second = _fit_stage(ends, output, model, teacher, resume, progress, metrics, spec)
    return replace(second, peak_gb=max(peak_gb, second.peak_gb))


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """Outside of steps, which say which batch would fit, full memory is at least named."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        whose = "GPU's" if isinstance(error, torch.OutOfMemoryError) else "machine's"
        detail = " ".join(str(error).partition(". ")[0].split()) or "no more could be allocated"
        raise TrainingError(
            f"The {whose} memory is full ({detail}): lower batch_size or, if it is set, leave out data.cache."
        ) from None


def open_loop(
    recipe: Recipe,
    output: str | Path,
    *,
    model: nn.Module | None = None,
    teacher: nn.Module | None = None,
    resume: bool = False,
    progress: bool = True,
    spec: ModelSpec | None = None,
) -> TrainingLoop:
    """All of `fit` up to the first step: the model is there and calibrated, the images are open.

    Args: as those of `fit`, and ``spec`` as in `qvit.training.setup.set_up`.

    Raises:
        QvitError: recipe, images, weights or checkpoint do not fit; nothing has been written.
    """
    accelerator = _accelerator(recipe)
    output = Path(output)
    _check_place(output)
    resumed = _checkpoint_of(output, resume)
    if resumed is not None:
        check_same_run(resumed, recipe, accelerator.num_processes)
    setup = set_up(recipe, accelerator, model, teacher, resumed, progress, spec)
    loop = TrainingLoop(recipe, accelerator, setup, output, resumed, progress)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The output folder {output} cannot be made ({error.strerror}): name another one.") from None
    return loop


def _accelerator(recipe: Recipe) -> Accelerator:
    """The devices and processes of a run; raises `RecipeError` where the recipe needs others."""
    if recipe.needs_gpu and not torch.cuda.is_available():
        raise RecipeError(
            "The recipe needs a GPU and PyTorch finds none: run it on a machine with one, or set needs_gpu=false to train on "
            "the CPU all the same."
        )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # autocast is entered here, so that evaluation runs without it
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )
    if accelerator.num_processes > 1:
        atexit.unregister(_leave_the_group)
        atexit.register(_leave_the_group)
    return accelerator


def _check_place(output: Path) -> None:
    """Raises `InputError` where the output folder could not be made or written, before minutes go into what it is for."""
    there = next((place for place in (output, *output.parents) if os.path.lexists(place)), None)
    if there is None:
        return
    if not there.is_dir():
        raise InputError(f"The output folder {output} cannot be made ({there} is no folder): name another one.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"The output folder {output} cannot be written (no permission in {there}): name another one.")


def _leave_the_group() -> None:
    """A process that ends with its group's threads alive is sometimes aborted by the C++ runtime, after all work is done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _checkpoint_of(output: Path, resume: bool) -> Checkpoint | None:
    path = output / LAST
    if not path.exists():
        return None
    if not resume:
        raise _taken(output)
    return read_checkpoint(path)


def _taken(output: Path) -> TrainingError:
    return TrainingError(f"{output} holds a run already: resume it, or name another output folder.")
