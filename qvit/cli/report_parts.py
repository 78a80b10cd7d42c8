"""The figures of `qvit report`, one after the other: what is measured for each, or why it is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qvit.analyze.attention_statistics import AttentionStatistics, class_token_maps, measure
from qvit.analyze.part_sensitivity import PartSensitivity, evaluations, part_sensitivity
from qvit.analyze.report.attention_figures import distance_section, maps_section, similarity_section
from qvit.analyze.report.distribution_figures import distribution_section
from qvit.analyze.report.result_figures import results_section
from qvit.analyze.report.rows import sensitivity_rows, statistics_rows, training_rows
from qvit.analyze.report.section import TITLES, Section
from qvit.analyze.report.sensitivity_figure import sensitivity_section
from qvit.analyze.report.training_figures import training_section
from qvit.batches import PixelBatches
from qvit.calibration import calibrate
from qvit.cli.images import as_tensors, location_of, name_of, open_evaluation, spaced
from qvit.cli.report_inputs import Opened, data_of, open_parent, open_teacher, recipe_of
from qvit.cli.report_results import own_rows, rows_of
from qvit.cli.show import count, progress, shape, widths
from qvit.convert import quantize
from qvit.errors import InputError, TrainingError
from qvit.sources import open_source
from qvit.training.data import open_split
from qvit.training.evaluate import evaluate
from qvit.training.setup import calibration_batches


@dataclass
class Report:
    """The parts of the page as they come together."""

    student: Opened
    baseline: Opened | None
    device: str
    sections: list[Section] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    statistics: dict[str, AttentionStatistics] = field(default_factory=dict)
    no_teacher: str = ""
    no_images: str = ""
    teacher: Opened | None = None
    data: list[str] = field(default_factory=list)
    data_name: str = ""
    batches: PixelBatches | None = None
    shown: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def opened(self) -> dict[str, Opened]:
        """role -> model, in the order in which figures draw them: what is on top comes last."""
        roles = {"teacher": self.teacher, "baseline": self.baseline, "student": self.student}
        return {role: model for role, model in roles.items() if model is not None}

    @property
    def titles(self) -> dict[str, str]:
        """role -> what the page calls it."""
        titles = {role: "float teacher" if role == "teacher" else model.title for role, model in self.opened.items()}
        if titles.get("baseline") == titles["student"]:
            titles["baseline"] += ", the other run"
        return titles

    @property
    def heading(self) -> str:
        """Model and method."""
        return f"{self.student.architecture.name}, {self.student.title}"

    @property
    def images(self) -> int:
        """Images that statistics are taken on."""
        assert self.batches is not None
        return len(self.batches.indices)

    @property
    def facts(self) -> dict[str, str]:
        """What stands above the figures."""
        a, known = self.student.architecture, self.student.facts
        bits = widths(self.student.weight_bits, self.student.act_bits, self.student.mixed)
        facts: dict[str, Any] = {"bits": bits, "method": self.student.title.rpartition(" ")[0]}
        facts["shape"] = shape(a)
        size = self.student.preprocessing.input_size
        facts["images"] = f"{size[1]} × {size[2]} pixels" + (f", patches of {a.patch_size[0]} × {a.patch_size[1]}" if a else "")
        for key, name in (("integer_top1", "top-1, integers"), ("fake_top1", "top-1"), ("float_top1", "top-1, float")):
            if known.get(key) is not None:
                # The float model's accuracy was measured when it was trained, perhaps on other images.
                counted = "images" in known and key != "float_top1"
                facts[name] = f"{known[key]:.2f} %" + (f" of {known['images']:.0f} images" if counted else "")
        if self.student.metadata:
            facts["epochs"] = str(known["epochs"])
            seed = self.student.metadata.recipe.get("seed")
            facts |= {"seed": str(seed)} if seed is not None else {}
        own = next((row for row in self.rows if row.get("own") and row.get("method") != "float"), None)
        if own:
            facts["file"] = f"{count(own['file_bytes'])} bytes"
        if self.batches is not None:
            facts["statistics"] = f"{self.images} images of {self.data_name}"
        if self.baseline is not None:
            facts["beside it"] = self.titles["baseline"]
        return facts

    def open_teacher(self, path: Path | None) -> None:
        self.teacher, self.no_teacher = open_teacher(path, self.student)

    def open_images(self, data: list[str] | None, images: int, maps: int, batch: int, workers: int | None) -> None:
        """Opens the images that were named, or those of the recipe; these may be gone."""
        self.data = data or []
        locations = data or data_of(self.student)
        if locations is None:
            self.no_images = "There are no images to run the model on: name them with --data."
            return
        classes, preprocessing = self.student.classes, self.student.preprocessing
        try:
            source, self.batches = open_evaluation(locations, classes, preprocessing, batch, images, workers)
        except InputError as error:
            if data:
                raise
            self.no_images = f"The images of the recipe cannot be used ({str(error).rstrip('.')}): name others with --data."
            return
        self.data_name = name_of(locations)
        for role, model in self.opened.items():
            if model.preprocessing.input_size != preprocessing.input_size:
                raise InputError(
                    f"The {role} takes images {model.preprocessing.input_size} (channels, height, width), the model "
                    f"{preprocessing.input_size}: compare models of one input size."
                )
        ((pixels, labels),) = PixelBatches(source, preprocessing, maps, indices=spaced(len(source), maps))
        self.shown = pixels, labels

    def add_results(self, files: Sequence[tuple[Path, dict[str, Any]]], latency: bool, threads: int | None) -> None:
        own = own_rows(self.student, latency, threads)
        others = [row for path, report in files for row in rows_of(path, report)]
        hints = []
        if not any(row.get("ms_median") for row in (*own, *others)):
            hints.append("Latency is not shown: measure it with --latency, or give result files that hold it with --results.")
        self.sections.append(results_section([*others, *own], hints))
        self.rows += [{"figure": "results", **row} for row in own]

    def add_training(self) -> None:
        logs = {role: model.log for role, model in self.opened.items() if model.log}
        if "student" not in logs:
            why = "There is no log of the training here: name the folder of the run, which holds metrics.jsonl."
            self.sections.append(_missing("training", why))
            return
        self.sections.append(training_section(logs, self.titles))
        self.rows += training_rows(logs)

    def add_attention(self) -> None:
        if self.batches is None or self.shown is None:
            self.sections += [_missing(name, self.no_images) for name in ("distributions", "distance", "maps", "similarity")]
            return
        self._drop_teacher_without_attention()
        titles = self.titles
        subjects = {role: model.subject(titles[role], self.device) for role, model in self.opened.items()}
        try:
            pixels = (pixels for pixels, _ in progress(self.batches, len(self.batches), "attention"))
            self.statistics = measure(subjects, pixels, "teacher")
            pictures, labels = self.shown
            maps = {role: class_token_maps(subject, pictures) for role, subject in subjects.items()}
        finally:
            for subject in subjects.values():
                subject.tracer.close()
        names = [str(self.student.classes[label]) for label in labels]
        self.sections += [
            distribution_section(self.statistics, titles, self.images),
            distance_section(self.statistics, titles, self.images),
            maps_section(maps, pictures, names, titles),
            similarity_section(self.statistics, titles, self.images, self.no_teacher),
        ]
        self.rows += statistics_rows(self.statistics, self.images)

    def _drop_teacher_without_attention(self) -> None:
        """A convolutional network may teach, but has nothing to show here."""
        if self.teacher is None:
            return
        try:
            self.teacher.subject("", self.device).tracer.close()
        except TrainingError:
            self.no_teacher = f"The teacher ({type(self.teacher.model).__name__}) has no attention to compare with."
            self.teacher = None

    def add_sensitivity(self) -> None:
        why = self.no_images
        if self.student.metadata is None:
            why = "A frozen file holds no floating-point weights to leave unquantized: name the run or its checkpoint."
        if why or self.batches is None:
            self.sections.append(_missing("sensitivity", why))
            return
        kept = list(as_tensors(self.batches, self.student.preprocessing))
        models = {"calibrated": self._calibrated_parent(), "trained": self.student.model}
        found = {state: model.to(self.device) for state, model in models.items() if model is not None}
        total = sum(map(evaluations, found.values()))
        turns = iter(progress(range(total), total, "parts and layers"))

        def measured(model: Any) -> PartSensitivity:
            def top1() -> float:
                next(turns)
                return evaluate(model, kept, self.device).top1

            return part_sensitivity(model, top1)

        results = {state: measured(model) for state, model in found.items()}
        self.sections.append(sensitivity_section(results["trained"], self.images, results.get("calibrated")))
        for state, result in results.items():
            self.rows += sensitivity_rows(result, self.images, state)

    def _calibrated_parent(self) -> Any | None:
        """The float model that the run began with, as it began: quantized like the student, calibrated on training images.

        ``None`` where there is none of the student's architecture, or no recipe of a training run, or no training images, or
        where the run began with another student.
        """
        metadata = self.student.metadata
        recipe = recipe_of(metadata) if metadata else None
        if metadata is None or metadata.student is None or recipe is None or recipe.quant.start_from:
            return None
        parent = open_parent(recipe, self.teacher)
        if parent is None or parent.architecture is None:
            return None
        if replace(self.student.architecture, name="") != replace(parent.architecture, name=""):
            return None
        try:
            source = open_source(location_of(self.data), "train") if self.data else open_split(recipe.data, "train")
        except InputError:
            return None
        # Of the student, not of the recipe: with a budget, that does not say which bits were chosen.
        spec, preprocessing = metadata.student.spec, self.student.preprocessing
        model: Any = quantize(parent.model.cpu(), spec=spec, preprocessing=preprocessing).to(self.device)
        calibrate(model, calibration_batches(recipe, source, preprocessing), images=recipe.quant.calibration_images)
        return model.eval()


def _missing(name: str, why: str) -> Section:
    """A section with nothing but the reason."""
    return Section(id=name, title=TITLES[name], missing=[why])
