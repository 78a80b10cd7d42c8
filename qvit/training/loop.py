"""The training loop: steps, evaluation at the end of an epoch, checkpoints, and what stops it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from qvit.distill.taps import tap_queries_keys
from qvit.errors import InputError, TrainingError
from qvit.kernels.switch import fused
from qvit.training.checkpoint import BEST, LAST, Checkpoint, Metadata, load_optimizer, save_checkpoint
from qvit.training.data import (
    BatchMixer,
    EpochSampler,
    TrainingSet,
    batches_of,
    evaluation_loader,
    loader_options,
    training_transform,
)
from qvit.training.evaluate import count_correct
from qvit.training.interrupt import InterruptGuard, TrainingInterrupted
from qvit.training.logs import RunLog
from qvit.training.meters import LossWindow, Stopwatch
from qvit.training.optim import build_optimizer, learning_rate, set_learning_rate
from qvit.training.recipe import Recipe
from qvit.training.result import TrainingResult
from qvit.training.seeding import seed_everything
from qvit.training.setup import Setup


class _Stop(Exception):
    """Ctrl-C was pressed, and the state is one that can be resumed from."""


class TrainingLoop:
    """One run, from where it stands to its end.

    Attributes:
        step: optimizer steps done.
        epochs: finished, evaluation included. Where an epoch's steps are done but not its evaluation, ``step`` is
            ``(epochs + 1) * steps_per_epoch``.
        metrics: accuracies so far; written into checkpoints.

    Raises:
        InputError: there are fewer images than a step takes.
        RecipeError: the augmentation or the optimizer cannot be made.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, setup: Setup, output: Path, resumed: Checkpoint | None
    ) -> None:
        self.recipe, self.accelerator, self.setup, self.output = recipe, accelerator, setup, output
        self.device = accelerator.device
        self.model: Any = setup.model
        step_size = recipe.batch_size * accelerator.num_processes
        self.sampler = EpochSampler(len(setup.train), step_size, recipe.seed, recipe.data.repeated_augmentation)
        self.steps_per_epoch = self.sampler.steps
        self.total_steps = self.steps_per_epoch * recipe.schedule.epochs
        if not self.steps_per_epoch:
            raise InputError(f"A step takes {step_size} training images and there are {len(setup.train)}: lower batch_size.")
        loader, self.val_loader = self._loaders()
        self.mix = BatchMixer(recipe.data, len(setup.train.classes))
        optimizer = build_optimizer(self.model, recipe.optim)
        if resumed is not None:
            load_optimizer(optimizer, resumed)
        self.parallel, self.optimizer, self.loader = accelerator.prepare(self.model, optimizer, loader)
        # A float distilled DeiT answers with the mean of its heads; a student learns labels and teacher on one head each.
        self.two_heads = bool(setup.loss.hard or setup.loss.soft) and hasattr(self.model, "set_distilled_training")
        self.bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and self.device.type == "cuda")

        self.fuse = self.bf16 and self.device.type == "cuda"  # float32 runs stay exact

        self.step = resumed.metadata.step if resumed else 0
        self.epochs = resumed.metadata.epochs if resumed else 0
        self.metrics: dict[str, float] = dict(resumed.metadata.metrics) if resumed else {"train_seconds": 0.0}
        if setup.float_top1 is not None:
            self.metrics["float_top1"] = setup.float_top1
        self.window = LossWindow()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.session = Stopwatch()

    def _loaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        recipe, setup, processes = self.recipe, self.setup, self.accelerator.num_processes
        mode = "L" if setup.preprocessing.input_size[0] == 1 else "RGB"
        train = TrainingSet(setup.train, training_transform(recipe.data, setup.preprocessing), mode, recipe.seed)
        options = loader_options(recipe.data.workers, self.device)
        loader = DataLoader(train, batch_size=recipe.batch_size, sampler=self.sampler, drop_last=True, **options)
        # Every process evaluates a share of its own, so no image is padded in or counted twice.
        mine = range(self.accelerator.process_index, len(setup.val), processes)
        workers = recipe.data.workers
        return loader, evaluation_loader(setup.val, setup.preprocessing, recipe.batch_size, workers, mine, self.device)

    def run(self, log: RunLog) -> TrainingResult:
        """Trains to the end.

        Raises:
            TrainingError: the loss is not a number, or a checkpoint cannot be written.
            TrainingInterrupted: Ctrl-C; the state is saved.
        """
        self.log = log
        with ExitStack() as stack:
            self.guard = stack.enter_context(InterruptGuard(self.accelerator.num_processes))
            if self.setup.loss.needs_taps:
                assert self.setup.teacher is not None
                self.student_taps = stack.enter_context(tap_queries_keys(self.model))
                self.teacher_taps = stack.enter_context(tap_queries_keys(self.setup.teacher))
            # Accelerate marks the models that it prepared; this one may be trained again, in another run.
            stack.callback(lambda: vars(self.model).pop("_is_accelerate_prepared", None))
            try:
                while self.epochs < self.recipe.schedule.epochs:
                    self._run_epoch()
            except _Stop:
                self._save_last()
                raise TrainingInterrupted(
                    f"Stopped after step {self.step} of {self.total_steps}: resume the run in {self.output} to go on."
                ) from None
        return self._result()

    def _run_epoch(self) -> None:
        watch = Stopwatch()
        self.sampler.start(self.epochs, self.step - self.epochs * self.steps_per_epoch)
        self.parallel.train()
        if self.two_heads:
            self.model.set_distilled_training(True)
        for images, labels in watch.watch(batches_of(self.loader)):
            with fused(self.fuse):
                self._train_step(images, labels)
            epoch_done = self.step % self.steps_per_epoch == 0
            log_due = epoch_done or self.step % self.recipe.log_every == 0
            if log_due:
                self._flush()
            if self.recipe.checkpoint_every and self.step % self.recipe.checkpoint_every == 0 and not epoch_done:
                self._save_last()
            self.log.advance(self.step)
            self._stop_if_asked(agreed=log_due)
        self._finish_epoch(watch)

    def _train_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One optimizer step on images [B, C, H, W] and labels [B]."""
        recipe, setup = self.recipe, self.setup
        seed_everything(recipe.seed, self.step, self.accelerator.process_index)
        images, targets = self.mix(images, labels)
        teacher_logits = teacher_taps = student_taps = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if setup.teacher is not None:
                with torch.no_grad():
                    teacher_logits = setup.teacher(images)
            logits = self.parallel(images)
            if setup.loss.needs_taps:
                teacher_taps, student_taps = self.teacher_taps.collect(), self.student_taps.collect()
            total, terms = setup.loss(logits, targets, teacher_logits, student_taps, teacher_taps)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        if recipe.optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optim.clip_grad)
        self.lr = learning_rate(self.step, self.steps_per_epoch, recipe.optim.lr, recipe.schedule)
        set_learning_rate(self.optimizer, self.lr)
        self.optimizer.step()
        self.window.add(total, terms)
        self.step += 1

    def _flush(self) -> None:
        """Logs the mean loss of the steps since the last time; raises `TrainingError` where it is not a number."""
        taken = self.window.take()
        if taken is None:
            return
        names, means = taken
        values = dict(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise TrainingError(self._not_a_number("loss"))
        self.log.write("train", self.step, self.epochs, {**values, "lr": self.lr})

    def _not_a_number(self, what: str) -> str:
        last = self.output / LAST
        kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was due yet"
        return f"The {what} is not a finite number at step {self.step}: lower optim.lr or set optim.clip_grad; {kept}."

    def _stop_if_asked(self, agreed: bool) -> None:
        """Raises `_Stop` after Ctrl-C: in a run of many processes only where all of them ask (``agreed``)."""
        if self.accelerator.num_processes == 1:
            asked = self.guard.requested
        elif agreed:
            asked = bool(self.accelerator.reduce(torch.tensor(float(self.guard.requested), device=self.device), "sum"))
        else:
            asked = False
        if asked:
            raise _Stop

    def _finish_epoch(self, watch: Stopwatch) -> None:
        self.session.add(watch)
        self.metrics["train_seconds"] += watch.seconds
        epoch = self.epochs + 1
        rate = watch.rate * self.accelerator.num_processes
        if watch.images:
            self.log.write("epoch", self.step, epoch, {"images_per_s": rate, "loader_idle": watch.idle})
        line = f"epoch {epoch}/{self.recipe.schedule.epochs}: {rate:.0f} images/s, {watch.idle:.0%} waiting for images"
        improved = False
        if epoch % self.recipe.eval_every == 0 or epoch == self.recipe.schedule.epochs:
            improved = self._evaluate(epoch)
            line += f", top-1 {self.metrics['top1']:.2f}"
        self.epochs = epoch
        self._check_weights()
        if improved:
            self._save(BEST)
        # The last one last: a run that is killed before it evaluates this epoch again, and writes the best one again.
        self._save(LAST, self.optimizer)
        self.log.print(line)

    def _evaluate(self, epoch: int) -> bool:
        """Top-1 over all validation images, in float32, each counted once; returns whether it is the best so far."""
        self.model.eval()
        mine = count_correct(self.model, self._stoppable(self.val_loader), self.device)
        if self.setup.loss.needs_taps:
            self.student_taps.clear()
        counts = torch.tensor([mine.correct, mine.images], device=self.device)
        correct, images = self.accelerator.reduce(counts, "sum").tolist()
        top1 = 100 * correct / images
        self.metrics |= {"top1": top1, "images": images}
        self.log.write("eval", self.step, epoch, {"top1": top1, "images": images})
        if top1 <= self.metrics.get("best_top1", -1):
            return False
        self.metrics |= {"best_top1": top1, "best_epoch": epoch}
        return True

    def _stoppable(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            self._stop_if_asked(agreed=False)
            yield batch

    def _save_last(self) -> None:
        self._flush()
        self._check_weights()
        self._save(LAST, self.optimizer)

    def _check_weights(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise TrainingError(self._not_a_number("model"))

    def _save(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        if self.accelerator.is_main_process:
            metadata = Metadata.of(
                self.model,
                self.setup.preprocessing,
                self.setup.train.classes,
                self.recipe.to_dict(),
                epochs=self.epochs,
                step=self.step,
                processes=self.accelerator.num_processes,
                metrics=self.metrics,
            )
            save_checkpoint(self.output / name, self.model, metadata, optimizer)

    def _result(self) -> TrainingResult:
        if self.two_heads:
            self.model.set_distilled_training(False)
        return TrainingResult(
            model=self.model.eval(),
            output=self.output,
            top1=self.metrics["top1"],
            best_top1=self.metrics["best_top1"],
            best_epoch=int(self.metrics["best_epoch"]),
            images=int(self.metrics["images"]),
            epochs=self.epochs,
            steps=self.step,
            train_seconds=self.metrics["train_seconds"],
            train_images_per_s=self.session.rate * self.accelerator.num_processes,
            loader_idle=self.session.idle,
            peak_gb=torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0,
        )
