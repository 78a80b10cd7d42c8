"""What `qvit report` is given: a run, a checkpoint or a frozen file, its teacher, and the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvit.analyze.attention_statistics import Subject
from qvit.analyze.products import has_mixed_widths, products_of, specs_of
from qvit.analyze.trace import tracer_of
from qvit.cli.checkpoints import INTEGER_SUFFIX, checkpoint_in
from qvit.convert import family_of
from qvit.errors import InputError, QvitError, RecipeError, UnsupportedModelError
from qvit.integer.model import IntegerModel
from qvit.preprocessing import Preprocessing
from qvit.sources import DIGITS
from qvit.training.cascade import read_stages
from qvit.training.checkpoint import BEST, LAST, Metadata, is_checkpoint, load_model
from qvit.training.models import build_model
from qvit.training.provenance import provenance_of
from qvit.training.recipe import Recipe

METHODS = {"float": "float", "baseline": "baseline", "irm": "IRM", "dgd": "DGD", "qvit": "Q-ViT", "calibration": "calibrated"}


@dataclass(frozen=True)
class Opened:
    """A model and what its file says of it.

    Attributes:
        model: a `torch.nn.Module` in evaluation mode, or an `IntegerModel`.
        preprocessing, architecture, classes: of the model.
        facts: provenance: accuracies in percent, data, method, recipe and the like, as a frozen file holds them.
        weight_bits, act_bits: of the blocks; 32 for a float model.
        metadata: of a checkpoint.
        log: lines of the run's log (`qvit.training.cascade.read_stages`); empty where there is none.
        file_bytes: of a frozen file.
        mixed: layers differ in their bits.
    """

    model: Any
    preprocessing: Preprocessing
    architecture: Any
    classes: Sequence[str]
    facts: Mapping[str, Any]
    weight_bits: int = 32
    act_bits: int = 32
    metadata: Metadata | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    file_bytes: int | None = None
    mixed: bool = False

    @property
    def title(self) -> str:
        """Method and bits, as far as they are known: ``Q-ViT W2A2``."""
        method = METHODS.get(str(self.facts.get("method")), str(self.facts.get("method") or "quantized"))
        return f"{method} W{self.weight_bits}A{self.act_bits}"

    def subject(self, title: str, device: str) -> Subject:
        """The model as something to be looked at."""
        model = self.model if isinstance(self.model, IntegerModel) else self.model.to(device)
        return Subject(title, tracer_of(model), self.preprocessing, self.architecture)


def open_quantized(path: Path) -> Opened:
    """A run's folder, a quantized checkpoint or a frozen file.

    Raises:
        QvitError: there is none, it cannot be read, or it is a float model.
    """
    if path.suffix == INTEGER_SUFFIX and not path.is_dir():
        frozen = IntegerModel.load(path)
        bits = frozen.block_bits()
        facts = frozen.provenance
        size = path.stat().st_size
        mixed = has_mixed_widths(frozen.architecture, frozen.specs)
        return Opened(
            frozen, frozen.preprocessing, frozen.architecture, frozen.classes, facts, *bits, file_bytes=size, mixed=mixed
        )
    file = checkpoint_in(path)
    model, metadata = load_model(file)
    if metadata.student is None:
        raise InputError(
            f"{file} holds a float model, and a report shows what quantization does: name a quantized run, checkpoint or file."
        )
    spec = metadata.student.spec
    log = read_stages(file.parent, metadata.metrics) if file.name in (BEST, LAST) else []
    bits = spec.weight_bits, spec.act_bits
    facts = provenance_of(metadata)
    mixed = has_mixed_widths(metadata.architecture, specs_of(products_of(metadata.architecture), spec))
    return Opened(
        model, metadata.preprocessing, metadata.architecture, metadata.classes, facts, *bits, metadata, log, mixed=mixed
    )


def open_teacher(path: Path | None, student: Opened) -> tuple[Opened | None, str]:
    """The float model that the student is compared with: that of ``--teacher``, else the one that its recipe names.

    Returns:
        The model, or ``None`` and a sentence why there is none.

    Raises:
        QvitError: the teacher that ``path`` names cannot be opened.
    """
    if path is not None:
        return _named_teacher(checkpoint_in(path), student), ""
    where = "name it with --teacher"
    if student.metadata is None:
        return None, f"A frozen file does not hold the float model that it came from: {where}."
    recipe = recipe_of(student.metadata)
    if recipe is None or not (recipe.teacher or recipe.model):
        return None, f"The checkpoint does not say which float model is its teacher: {where}."
    try:
        return _built(recipe, recipe.teacher or recipe.model), ""
    except QvitError as error:
        return None, f"The teacher that the recipe names cannot be opened ({str(error).rstrip('.')}): {where}."


def open_parent(recipe: Recipe, teacher: Opened | None) -> Opened | None:
    """The float model that a run began with: the ``teacher`` or, where the recipe has a teacher of its own, the recipe's model.

    ``None`` where there is none, or it cannot be opened.
    """
    if recipe.teacher is None:
        return teacher
    try:
        return _built(recipe, recipe.model) if recipe.model else None
    except QvitError:
        return None


def _named_teacher(path: Path, student: Opened) -> Opened:
    if is_checkpoint(path):
        model, metadata = load_model(path)
        if metadata.student is not None:
            raise InputError(f"The teacher {path} is quantized: use a float model.")
        facts = provenance_of(metadata)
        return Opened(model, metadata.preprocessing, metadata.architecture, metadata.classes, facts, metadata=metadata)
    recipe = recipe_of(student.metadata) if student.metadata else None
    section = recipe and (recipe.teacher or recipe.model)
    if recipe is None or section is None:
        raise InputError(f"{path} does not say which model it belongs to: name a float checkpoint or run of qvit as --teacher.")
    return _built(recipe, section.model_copy(update={"checkpoint": path, "pretrained": False}))


def recipe_of(metadata: Metadata) -> Recipe | None:
    """The recipe of a checkpoint; ``None`` where it was written without one (``qvit quantize``)."""
    try:
        return Recipe.from_dict(metadata.recipe)
    except RecipeError:
        return None


def _built(recipe: Recipe, section: Any) -> Opened:
    model, preprocessing = build_model(section, recipe.data)
    try:
        architecture = family_of(model).describe(model)
    except (UnsupportedModelError, AttributeError):
        architecture = None
    return Opened(model.eval(), preprocessing, architecture, (), {"method": "float"})


def data_of(student: Opened) -> list[str] | None:
    """The validation images that the student's recipe names; ``None`` where it names none that could be found here."""
    facts = student.metadata.recipe if student.metadata else student.facts.get("recipe") or {}
    data = facts.get("data") if isinstance(facts.get("data"), Mapping) else {}
    locations = (data.get("val") or data.get("train")) if data else student.facts.get("data")
    if not locations:
        return None
    found = [locations] if isinstance(locations, str) else list(locations)
    # A frozen file keeps names without their folders.
    return found if student.metadata or found == [DIGITS] else None
