"""The training loop: steps, evaluation at the end of an epoch, checkpoints, and what stops it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from qvit.errors import InputError, TrainingError
from qvit.integer.freeze import rounded_to_half
from qvit.kernels.switch import fused
from qvit.training.annealing import Annealing
from qvit.training.averaging import average_gradients
from qvit.training.checkpoint import BEST, LAST, PROJECTOR, Checkpoint, Metadata, load_optimizer, snapshot
from qvit.training.compiled import CompiledBlocks
from qvit.training.data import BatchMixer, EpochSampler, batches_of
from qvit.training.evaluate import count_correct
from qvit.training.graphed import GraphedBackward
from qvit.training.interrupt import InterruptGuard, TrainingInterrupted
from qvit.training.loaders import build_loaders
from qvit.training.logs import RunLog
from qvit.training.memory import DeviceMemory, fitting_batch, fitting_half, is_full
from qvit.training.meters import LossWindow, Stopwatch
from qvit.training.objective import Objective
from qvit.training.optim import anneal_start, build_optimizer, learning_rate, set_learning_rate
from qvit.training.oscillation import OscillationPenalty, penalty_weight
from qvit.training.recipe import Recipe
from qvit.training.result import TrainingResult
from qvit.training.seeding import seed_everything
from qvit.training.setup import Setup
from qvit.training.stages import Stages
from qvit.training.targets import CachedTargets
from qvit.training.writer import BackgroundWriter


class _Stop(Exception):
    """Ctrl-C was pressed, and the state is one that can be resumed from."""


class TrainingLoop:
    """One run, from where it stands to its end.

    Attributes:
        step: optimizer steps done.
        epochs: finished, evaluation included. Where an epoch's steps are done but not its evaluation, ``step`` is
            ``(epochs + 1) * steps_per_epoch``.
        metrics: accuracies so far, and of a cascade's second stage how long the first was (`qvit.training.cascade`); written
            into checkpoints.

    Raises:
        InputError: there are fewer images than a step takes.
        RecipeError: the augmentation or the optimizer cannot be made.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        setup: Setup,
        output: Path,
        resumed: Checkpoint | None,
        progress: bool = False,
    ) -> None:
        self.recipe, self.accelerator, self.setup, self.output = recipe, accelerator, setup, output
        self.device = accelerator.device
        self.model: Any = setup.model
        step_size = recipe.batch_size * accelerator.num_processes
        crops = recipe.distill.cached_crops if recipe.quantized else 0
        self.sampler = EpochSampler(len(setup.train), step_size, recipe.seed, recipe.data.repeated_augmentation, crops)
        self.steps_per_epoch = self.sampler.steps
        self.total_steps = self.steps_per_epoch * recipe.schedule.epochs
        if not self.steps_per_epoch:
            raise InputError(f"A step takes {step_size} training images and there are {len(setup.train)}: lower batch_size.")
        self.loader, self.val_loader = build_loaders(recipe, setup, accelerator, self.sampler, progress)
        self.mix = BatchMixer(recipe.data, len(setup.train.classes))
        self.targets = self._cached_targets(resumed) if crops else None
        self.stages = Stages(recipe, self.model, setup.loss, self.steps_per_epoch)
        self.penalty = OscillationPenalty(self.model) if recipe.quantized and recipe.oscillation.weight else None
        self.annealing = Annealing(self.model, recipe.anneal.width) if recipe.quantized and recipe.anneal.share else None
        self.anneal_from = anneal_start(self.steps_per_epoch, recipe.schedule, recipe.anneal)
        beside = [] if setup.projector is None else [*setup.projector.parameters()]
        self.parameters: list[nn.Parameter] = [*self.model.parameters(), *beside]
        optimizer = build_optimizer(self.model, recipe.optim, setup.projector)
        if resumed is not None:
            load_optimizer(optimizer, resumed)
        self.optimizer = accelerator.prepare(optimizer)
        # A float distilled DeiT answers with the mean of its heads; a student learns labels and teacher on one head each.
        self.two_heads = bool(setup.loss.hard or setup.loss.soft) and hasattr(self.model, "set_distilled_training")
        bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and self.device.type == "cuda")
        self.fuse = bf16 and self.device.type == "cuda"  # float32 runs stay exact
        features = self.stages.needs_features
        self.objective = Objective(setup, features, recipe.distill.feature_blocks, self.device, bf16)
        graphed = recipe.cuda_graph and self.device.type == "cuda"
        self.backward = GraphedBackward(self._backward, self.parameters, graphed)
        self.compiled = CompiledBlocks(self.model, setup.teacher, tapped=setup.loss.needs_taps, enabled=recipe.compile)

        self.step = resumed.metadata.step if resumed else 0
        self.epochs = resumed.metadata.epochs if resumed else 0
        self.metrics: dict[str, float] = dict(resumed.metadata.metrics) if resumed else {"train_seconds": 0.0}
        if setup.float_top1 is not None:
            self.metrics["float_top1"] = setup.float_top1
        self.window = LossWindow()
        self.writer = BackgroundWriter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.session = Stopwatch()

    def _cached_targets(self, resumed: Checkpoint | None) -> CachedTargets:
        targets = CachedTargets(
            self.sampler,
            len(self.setup.train),
            len(self.setup.train.classes),
            self.recipe.batch_size,
            self.device,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        if resumed is not None:
            targets.load(resumed.tensors)
        return targets

    def run(self, log: RunLog) -> TrainingResult:
        """Trains to the end.

        Raises:
            TrainingError: the loss is not a number, a step's memory is full, or a checkpoint cannot be written.
            TrainingInterrupted: Ctrl-C; the state is saved.
        """
        self.log = log
        with ExitStack() as stack:
            self.guard = stack.enter_context(InterruptGuard(self.accelerator.num_processes))
            stack.enter_context(self.stepping())
            try:
                while self.epochs < self.recipe.schedule.epochs:
                    self._run_epoch()
                self.writer.wait()
            except _Stop:
                self._save_last()
                self.writer.wait()
                raise TrainingInterrupted(
                    f"Stopped after step {self.step} of {self.total_steps}: resume the run in {self.output} to go on."
                ) from None
        return self._result()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Within it the model is in training mode, and `train_step` finds what the loss reads of student and teacher."""
        with ExitStack() as stack:
            stack.enter_context(self.objective.attached())
            stack.enter_context(self.compiled.attached())
            self._train_mode()
            yield

    def _train_mode(self) -> None:
        self.objective.loss = self.stages.enter(self.epochs, self.step, self.accelerator)
        self.model.train()
        if self.two_heads:
            self.model.set_distilled_training(True)

    def _run_epoch(self) -> None:
        watch = Stopwatch(self.device)
        self.sampler.start(self.epochs, self.step - self.epochs * self.steps_per_epoch)
        if self.targets is not None:
            self.targets.start()
        self._train_mode()
        for images, labels in watch.watch(batches_of(self.loader)):
            self.train_step(images, labels)
            epoch_done = self.step % self.steps_per_epoch == 0
            log_due = epoch_done or self.step % self.recipe.log_every == 0
            if log_due:
                self._flush()
            if self.recipe.checkpoint_every and self.step % self.recipe.checkpoint_every == 0 and not epoch_done:
                self._save_last()
            self.log.advance(self.step)
            self._stop_if_asked(agreed=log_due)
        self._finish_epoch(watch)

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One optimizer step on images [B, C, H, W] and labels [B] on the device; within `stepping`."""
        try:
            with fused(self.fuse), self.compiled.running():
                self._train_step(images, labels)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_full(error):
                raise
            on_gpu = isinstance(error, torch.OutOfMemoryError)
        # Only here is the traceback gone, which held what the step had computed.
        raise TrainingError(self._out_of_memory(images, labels, on_gpu))

    def _out_of_memory(self, images: torch.Tensor, labels: torch.Tensor, on_gpu: bool) -> str:
        self.objective.clear()
        self.backward.clear()

        def probe(count: int) -> None:
            some = images[:count], labels[:count]
            if count % 2 == 0 or not self.recipe.mixes:  # else there is an image without another to be mixed with
                some = self._mixed(*some)
            with fused(self.fuse):
                total, _ = self.objective(*some, None)
                torch.autograd.grad(total, [p for p in self.parameters if p.requires_grad], allow_unused=True)

        if on_gpu:
            states = 1 if self.optimizer.state_dict()["state"] else 3
            fits = fitting_batch(len(images), probe, self.model, states, DeviceMemory())
        else:
            fits = fitting_half(len(images), probe)
        least, few = (2, "two images fit") if self.recipe.mixes else (1, "one image fits")
        enough = fits is not None and fits >= least
        advice = f"batch_size={fits} should fit" if enough else f"not even {few} beside the model"
        whose = "GPU's" if on_gpu else "machine's"
        return f"The {whose} memory is full at step {self.step} with batch_size={len(images)}: {advice}; {self._kept()}."

    def _train_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        recipe = self.recipe
        images, targets = self._mixed(images, labels)
        answer = None
        if self.targets is not None and self.setup.teacher is not None:
            answer = self.objective.ask(partial(self.targets.next, teacher=self.setup.teacher), images)
        total, terms = self.backward(images, targets, answer, key=self.stages.activations_only(self.epochs))
        average_gradients(self.parameters, self.accelerator.num_processes)
        if self.penalty is not None:
            terms = {**terms, "oscillation": self._add_penalty(self.penalty)}
        if recipe.optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.parameters, recipe.optim.clip_grad)
        self.lr = learning_rate(self.step, self.steps_per_epoch, recipe.optim.lr, recipe.schedule, recipe.anneal)
        set_learning_rate(self.optimizer, self.lr)
        with self.annealing.holding() if self.annealing and self.step >= self.anneal_from else nullcontext():
            self.optimizer.step()
        self.window.add(total, terms)
        self.step += 1

    def _mixed(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and targets of this step, and the seed of everything that is drawn in it."""
        seed_everything(self.recipe.seed, self.step, self.accelerator.process_index)
        return self.mix(images, labels)

    def _backward(
        self, images: torch.Tensor, targets: torch.Tensor, answer: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Forward and backward pass: adds to the gradients of the parameters; returns the loss and its terms, without gradient.

        Args: as those of `Objective`.
        """
        total, terms = self.objective(images, targets, answer)
        total.backward()
        return total.detach(), terms

    def _add_penalty(self, penalty: OscillationPenalty) -> torch.Tensor:
        """Adds the gradients of the oscillation penalty; returns what it adds to the loss, a scalar."""
        section = self.recipe.oscillation
        factor = penalty_weight(self.step, self.total_steps, section.weight, section.start)
        if not factor or self.stages.activations_only(self.epochs):
            return torch.zeros((), device=self.device)
        return factor * penalty.add_gradients(factor)

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
        return f"The {what} is not a finite number at step {self.step}: lower optim.lr or set optim.clip_grad; {self._kept()}."

    def _kept(self) -> str:
        self.writer.wait()
        last = self.output / LAST
        return f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was due yet"

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
        last = epoch == self.recipe.schedule.epochs
        improved = False
        with ExitStack() as stack:
            if epoch % self.recipe.eval_every == 0 or last:
                if self.recipe.quantized:  # what is measured, and kept as the best and at the end, is what freezing gives
                    stack.enter_context(rounded_to_half(self.model, keep=last))
                top1, improved = self._evaluate(epoch)
                line += f", top-1 {top1:.2f}"
            self.epochs = epoch
            if self.targets is not None:
                self.targets.share()
            self._check_weights()
            self.writer.wait()  # one epoch's copies at a time
            if improved:
                self._save(BEST)
        # The last one last: a run that is killed before it evaluates this epoch again, and writes the best one again.
        self._save(LAST, self.optimizer)
        self.log.print(line)

    def _evaluate(self, epoch: int) -> tuple[float, bool]:
        """Top-1 over all validation images, in float32, each counted once, and whether it is the best so far.

        With weights in floating point it is only logged: the model is not yet what the run is to give.
        """
        self.model.eval()
        mine = count_correct(self.model, self._stoppable(self.val_loader), self.device)
        self.objective.clear()
        counts = torch.tensor([mine.correct, mine.images], device=self.device)
        correct, images = self.accelerator.reduce(counts, "sum").tolist()
        top1 = 100 * correct / images
        if self.stages.activations_only(epoch - 1):
            self.log.write("eval_activations", self.step, epoch, {"top1": top1, "images": images})
            return top1, False
        self.metrics |= {"top1": top1, "images": images}
        self.log.write("eval", self.step, epoch, {"top1": top1, "images": images})
        improved = top1 > self.metrics.get("best_top1", -1)
        if improved:
            self.metrics |= {"best_top1": top1, "best_epoch": epoch}
        return top1, improved

    def _stoppable(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            self._stop_if_asked(agreed=False)
            yield batch

    def _save_last(self) -> None:
        self._flush()
        if self.targets is not None:
            self.targets.share()
        self._check_weights()
        self.writer.wait()
        self._save(LAST, self.optimizer)

    def _check_weights(self) -> None:
        # Stacked, so that a GPU is waited for once.
        if not bool(torch.stack([p.isfinite().all() for p in self.parameters]).all()):
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
            more = {} if optimizer is None else self._to_resume()
            self.writer.submit(snapshot(self.output / name, self.model, metadata, optimizer, more))

    def _to_resume(self) -> dict[str, torch.Tensor]:
        """Tensors that a run goes on with, beside the model and the optimizer's."""
        tensors = {} if self.targets is None else self.targets.state()
        if self.setup.projector is not None:
            tensors |= {PROJECTOR + name: tensor for name, tensor in self.setup.projector.state_dict().items()}
        return tensors

    def _result(self) -> TrainingResult:
        if self.two_heads:
            self.model.set_distilled_training(False)
        first = {what: self.metrics.get(f"first_stage_{what}", 0) for what in ("epochs", "steps", "seconds")}
        return TrainingResult(
            model=self.model.eval(),
            output=self.output,
            top1=self.metrics["top1"],
            best_top1=self.metrics["best_top1"],
            best_epoch=int(first["epochs"] + self.metrics["best_epoch"]),
            images=int(self.metrics["images"]),
            epochs=int(first["epochs"]) + self.epochs,
            steps=int(first["steps"]) + self.step,
            train_seconds=first["seconds"] + self.metrics["train_seconds"],
            train_images_per_s=self.session.rate * self.accelerator.num_processes,
            loader_idle=self.session.idle,
            peak_gb=torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0,
        )
