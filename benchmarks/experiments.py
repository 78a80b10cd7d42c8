"""One experiment of the ablation: train by a recipe, freeze, run the integers on all validation images."""

from __future__ import annotations

import gc
import hashlib
import json
import lzma
import shlex
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import VARIANTS, public

import qvit
from qvit.analyze.agreement import agreement
from qvit.engines.reference import ReferenceEngine
from qvit.errors import InputError
from qvit.files import write_atomically
from qvit.training.checkpoint import LAST, read_checkpoint, save_checkpoint
from qvit.training.data import open_split
from qvit.training.device_data import DeviceEvaluationLoader
from qvit.training.engine import fit
from qvit.training.evaluate import evaluate
from qvit.training.models import build_model
from qvit.training.pixels import load_pixels
from qvit.training.recipe import Recipe

EVALUATION_BATCH = 100


@dataclass(frozen=True)
class DataSet:
    """What an experiment's images are, and which recipes are for them.

    Attributes:
        recipe: of quantized models.
        files: recipe key -> file names in the data folder; a list becomes a list.
        teacher: file of the float model, in the data folder; trained by ``float_recipe`` where that is given instead.
        float_recipe: trains the float model.
        float_teacher: file of the model that teaches the float model, in the data folder.
        changes: overrides of ``recipe``.
        by_bits: overrides for a number of bits, after those.
    """

    recipe: str
    files: dict[str, str | list[str]] = field(default_factory=dict)
    teacher: str | None = None
    float_recipe: str | None = None
    float_teacher: str | None = None
    changes: list[str] = field(default_factory=list)
    by_bits: dict[int, list[str]] = field(default_factory=dict)


_IMAGENETTE: dict[str, str | list[str]] = {
    "data.train": ["imagenette224-train-0.tar", "imagenette224-train-1.tar"],
    "data.val": "imagenette224-val.tar",
}
# What these networks were trained with. The recipe's later settings have been tried on DeiT-T alone, in half the epochs.
_FEATURES_ONCE = ["optim.lr=2.0e-4", "distill.feature=1"]
_VIT_SMALL = "vit_small_patch14_224_imagenette.safetensors"


DATA_SETS = {
    "imagenette": DataSet(
        recipe="imagenette",
        files=_IMAGENETTE,
        teacher=_VIT_SMALL,
        by_bits={2: ["cascade.share=0.25"]},
    ),
    "imagenette-deit-tiny": DataSet(
        recipe="imagenette",
        files=_IMAGENETTE,
        float_recipe="imagenette_deit_tiny_float",
        float_teacher=_VIT_SMALL,
        changes=["model.name=deit_tiny_patch16_224", "model.args={num_classes: 10}", *_FEATURES_ONCE],
        by_bits={2: ["optim.lr=5.0e-4", "schedule.epochs=80"], 4: ["schedule.epochs=40"]},
    ),
    "imagenette-swin-tiny": DataSet(
        recipe="imagenette",
        files=_IMAGENETTE,
        float_recipe="imagenette_swin_float",
        float_teacher=_VIT_SMALL,
        changes=["model.name=swin_tiny_patch4_window7_224", "model.args={num_classes: 10}", *_FEATURES_ONCE],
        by_bits={2: ["optim.lr=5.0e-4", "schedule.epochs=24"]},
    ),
    "cifar10": DataSet(recipe="cifar10", files={"data.train": "cifar10.tar"}, float_recipe="cifar10_float"),
    "digits": DataSet(recipe="digits", float_recipe="digits_float"),
}


@dataclass(frozen=True)
class Experiment:
    """What is trained.

    Attributes:
        data: a key of `DATA_SETS`.
        variant: a key of `VARIANTS`; ``float`` trains the float model.
        bits: of weights and activations, 32 for ``float``.
        seed: of the run.
        overrides: of the recipe, beyond those of data set, variant, bits and seed.
    """

    data: str
    variant: str
    bits: int
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def changes(self) -> list[str]:
        """All overrides but those that name files."""
        if self.variant == "float":
            return [f"seed={self.seed}", *self.overrides]
        data = DATA_SETS[self.data]
        return [
            *data.changes,
            *data.by_bits.get(self.bits, []),
            *VARIANTS[self.variant],
            *self.overrides,
            f"quant.bits={self.bits}",
            f"seed={self.seed}",
        ]

    @property
    def recipe_name(self) -> str:
        """Of the recipe that it starts from."""
        data = DATA_SETS[self.data]
        return data.float_recipe or "" if self.variant == "float" else data.recipe

    def key(self) -> dict[str, Any]:
        """What tells its row from those of others: an experiment of the same key is not run again."""
        return {
            "data": self.data,
            "variant": self.variant,
            "weight_bits": self.bits,
            "seed": self.seed,
            "overrides": " ".join(public(self.changes)),
        }

    def name(self) -> str:
        """Of its folder and its ``.qvit`` file."""
        digest = hashlib.blake2b(json.dumps(self.key()).encode(), digest_size=3).hexdigest()
        return f"{self.data}-{self.variant}-w{self.bits}a{self.bits}-seed{self.seed}-{digest}"

    def command(self) -> str:
        """The command line that trains it."""
        changes = [word for change in public(self.changes) for word in ("--set", change)]
        data = DATA_SETS[self.data]
        start = data.teacher or f"runs/{data.float_recipe}"
        files = [word for key, names in data.files.items() for word in _flags(key, names)]
        checkpoint = ["--checkpoint", start]
        if self.variant == "float":
            checkpoint = ["--teacher", data.float_teacher] if data.float_teacher else []
        output = f"runs/{self.name()}"
        return shlex.join(["qvit", "train", self.recipe_name, *files, *checkpoint, *changes, "-o", output])


def _flags(key: str, names: str | list[str]) -> list[str]:
    flag = "--train-data" if key == "data.train" else "--val-data"
    return [part for name in ([names] if isinstance(names, str) else names) for part in (flag, name)]


@dataclass
class Bench:
    """Where experiments are run; keeps images and float models between them.

    Attributes:
        folder: of the real data.
        runs: folder of runs and frozen files.
        workers: loader processes.
        agreement_images: compared with the reference engine code by code.
        keep: keep the checkpoints of a run.
    """

    folder: Path
    runs: Path
    workers: int
    agreement_images: int = 200
    keep: bool = False
    _validation: dict[str, Any] = field(default_factory=dict)
    _float_top1: dict[str, float] = field(default_factory=dict)

    def float_checkpoint(self, data: str) -> Path:
        """The float model of a data set, there or to be trained."""
        described = DATA_SETS[data]
        if described.teacher:
            return self.folder / described.teacher
        return self.runs / f"{described.float_recipe}.safetensors"

    def recipe(self, experiment: Experiment) -> Recipe:
        """The recipe of an experiment with this machine's files."""
        files = []
        for key, names in DATA_SETS[experiment.data].files.items():
            paths = [str(self.located(name)) for name in ([names] if isinstance(names, str) else names)]
            files.append(f"{key}={json.dumps(paths if len(paths) > 1 else paths[0])}")
        if experiment.variant != "float":
            files.append(f"model.checkpoint={self.float_checkpoint(experiment.data)}")
        elif teacher := DATA_SETS[experiment.data].float_teacher:
            files.append(f"teacher.checkpoint={self.located(teacher)}")
        return Recipe.load(experiment.recipe_name, [*files, f"data.workers={self.workers}", *experiment.changes])

    def located(self, name: str) -> Path:
        """A file of the data folder; one that is there as ``name.xz`` alone is unpacked into the folder of runs.

        Raises:
            InputError: it is in neither form.
        """
        path = self.folder / name
        if path.exists():
            return path
        unpacked, packed = self.runs / name, path.with_name(path.name + ".xz")
        if unpacked.exists():
            return unpacked
        if not packed.exists():
            raise InputError(f"There is no {path}, nor {packed.name}: name the data folder with --data-dir.")
        write_atomically(unpacked, lzma.decompress(packed.read_bytes()))
        return unpacked

    def run(self, experiment: Experiment) -> dict[str, Any]:
        """Trains (or goes on with a run that was cut short), freezes and evaluates; the row of the result file."""
        start = time.perf_counter()
        recipe = self.recipe(experiment)
        folder = self.runs / experiment.name()
        result = fit(recipe, folder, resume=True, progress=False)
        # The loop is gone but for cycles, which hold the memory of a recorded step.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        row: dict[str, Any] = {
            **experiment.key(),
            "model": recipe.model.name if recipe.model else None,
            "method": recipe.method if experiment.variant != "ours" else "ours",
            "act_bits": experiment.bits,
            "epochs": result.epochs,
            "steps": result.steps,
            "batch": recipe.batch_size,
            "train_seconds": result.train_seconds,
            "train_images_per_s": result.steps * recipe.batch_size / result.train_seconds,
            "loader_idle": result.loader_idle,
            "peak_gb": result.peak_gb,
            "recipe": experiment.recipe_name,
            "command": experiment.command(),
        }
        if experiment.variant == "float":
            row |= {"float_top1": result.top1, "images": result.images}
            # Without the optimizer's state.
            save_checkpoint(self.float_checkpoint(experiment.data), result.model, read_checkpoint(folder / LAST).metadata)
        else:
            row["float_top1"] = self.float_top1(experiment.data, recipe)
            row |= self._measure(experiment, recipe, result.model, row["float_top1"])
        if not self.keep:
            shutil.rmtree(folder)
        return row | {"wall_seconds": time.perf_counter() - start, **_device()}

    def _measure(self, experiment: Experiment, recipe: Recipe, student: Any, float_top1: float) -> dict[str, Any]:
        images, classes = self._images(experiment.data, recipe, student.qvit.preprocessing)
        device = next(student.parameters()).device
        model = qvit.freeze(student, classes, {"float_top1": float_top1, "data": experiment.data})
        engine = ReferenceEngine(model, device)
        some = self._some(images)
        return {
            "fake_top1": evaluate(student, images, device).top1,
            "integer_top1": evaluate(engine.forward, images, device).top1,
            **agreement(student, engine, some).to_row(),
            "agreement_images": sum(len(labels) for _, labels in some),
            "images": len(images.store),
            "engine": engine.name,
            "file_bytes": model.save(self.runs / f"{experiment.name()}.qvit"),
        }

    def _images(self, data: str, recipe: Recipe, preprocessing: Any) -> tuple[DeviceEvaluationLoader, list[str]]:
        """All validation images of a data set, on the device, and their classes."""
        if data not in self._validation:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            source = open_split(recipe.data, "val")
            store = load_pixels(source, preprocessing.pixels, device, self.workers, what="validation")
            self._validation[data] = DeviceEvaluationLoader(store, preprocessing, EVALUATION_BATCH), source.classes
        return self._validation[data]

    def _some(self, images: DeviceEvaluationLoader) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Evenly spaced images, in batches; validation images are sorted by class."""
        count = len(images.store)
        indices = torch.linspace(0, count - 1, min(self.agreement_images, count)).round().long()
        pixels, labels = images.store.pixels[indices], images.store.labels[indices]
        return [
            (images.normalise(pixels[i : i + EVALUATION_BATCH]), labels[i : i + EVALUATION_BATCH])
            for i in range(0, len(labels), EVALUATION_BATCH)
        ]

    def float_top1(self, data: str, recipe: Recipe) -> float:
        """Top-1 of the float model that the student starts from, on the same images."""
        if data not in self._float_top1:
            assert recipe.model is not None
            model, preprocessing = build_model(recipe.model, recipe.data)
            images, _ = self._images(data, recipe, preprocessing)
            device = images.store.pixels.device
            self._float_top1[data] = evaluate(model.to(device).eval(), images, device).top1
        return self._float_top1[data]


def _device() -> dict[str, Any]:
    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
