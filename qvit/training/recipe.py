"""A training recipe: a YAML file whose keys are checked, one line of which chooses the method.

`qvit/recipes/*.yaml` are examples; `Recipe` and its sections document every key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from qvit.errors import RecipeError
from qvit.spec import ModelSpec
from qvit.training.recipe_errors import sentence
from qvit.training.sections import (
    ActivationsFirstSection,
    AnnealSection,
    CascadeSection,
    DataSection,
    DistillSection,
    ModelSection,
    OptimSection,
    OscillationSection,
    QuantSection,
    ScheduleSection,
    Section,
)


class Recipe(Section):
    """Everything that decides how a model is trained.

    Attributes:
        method: ``float`` trains the float model; ``baseline`` a quantized one with logit distillation; ``irm`` adds
            rectification of q and k, ``dgd`` the distillation of their similarities, and ``qvit`` both.
        model: the float model to start from; not needed where a live model is passed to `qvit.train`.
        teacher: the float model as it was before quantization, where this is left out; the method ``float`` has none then.
        batch_size: images a step and process.
        seed: of everything that is drawn.
        needs_gpu: refuse to start where there is no GPU, rather than train for weeks on a CPU.
        precision: ``bf16`` autocast, ``fp32``, or ``auto``: bf16 on a GPU, fp32 on a CPU.
        cuda_graph: on a GPU, record a step once and replay it (`qvit.training.graphed`).
        compile: run the transformer blocks of student and teacher through ``torch.compile`` in training steps, which costs a
            few seconds of compiling for each shape of block (`qvit.training.compiled`).
        log_every: steps between two lines of the log.
        eval_every: epochs between two evaluations; the last epoch is always evaluated.
        checkpoint_every: steps between two checkpoints within an epoch; one is always written at the end of an epoch.
    """

    method: Literal["float", "baseline", "irm", "dgd", "qvit"] = "qvit"
    model: ModelSection | None = None
    teacher: ModelSection | None = None
    data: DataSection = DataSection()
    quant: QuantSection = QuantSection()
    distill: DistillSection = DistillSection()
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    activations_first: ActivationsFirstSection = ActivationsFirstSection()
    cascade: CascadeSection = CascadeSection()
    oscillation: OscillationSection = OscillationSection()
    anneal: AnnealSection = AnnealSection()
    batch_size: Annotated[int, Field(ge=1)] = 128
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    needs_gpu: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    cuda_graph: bool = True
    compile: bool = False
    log_every: Annotated[int, Field(ge=1)] = 50
    eval_every: Annotated[int, Field(ge=1)] = 1
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for key in ("model", "teacher"):
            _check_named(key, getattr(self, key))
        for name in ("scale", "ratio"):
            least, most = getattr(self.data.augment, name)
            if least > most:
                raise ValueError(f"data.augment.{name} is [{least}, {most}]: give the smaller number first")
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size is {self.batch_size}, but mixup and cutmix pair up images: use an even number")
        if self.schedule.warmup_epochs > self.schedule.epochs:
            raise ValueError(f"schedule.warmup_epochs is more than schedule.epochs ({self.schedule.epochs})")
        if self.quantized and self.distill.cached_crops:
            self._check_cached_crops()
        first = self.activations_first.epochs
        if first and first >= self.schedule.epochs * (1 - self.anneal.share):
            raise ValueError(
                f"activations_first.epochs is {first}, which leaves no epoch of {self.schedule.epochs} for the weights to join "
                "(and anneal): use fewer"
            )
        if self.cascades and self.schedule.epochs < 2:
            raise ValueError("schedule.epochs is 1, and a cascade has two stages: use more, or set cascade.share to 0")
        if self.cascades and first and first >= self.first_stage_epochs:
            raise ValueError(
                f"activations_first.epochs is {first}, which leaves no epoch of the {self.first_stage_epochs} in the cascade's "
                "first stage for the weights to join: use fewer, or more cascade.share"
            )
        if self.schedule.min_lr > self.optim.lr:
            raise ValueError(f"schedule.min_lr is more than optim.lr ({self.optim.lr})")
        return self

    def _check_cached_crops(self) -> None:
        reason = None
        if self.dgd_weight:
            reason = "DGD reads the teacher's q and k: set distill.dgd to 0, or choose another method"
        elif self.needs_features:
            reason = "feature matching reads the teacher's features: set distill.feature and activations_first.feature to 0"
        elif self.mixes:
            reason = "mixed images are new in every step: set data.mixup and data.cutmix to 0"
        elif not (self.distill.hard or self.distill.soft):
            reason = "the loss reads no teacher: set distill.soft or distill.hard"
        if reason is not None:
            raise ValueError(f"distill.cached_crops keeps the teacher's logits alone, but {reason}")

    @property
    def quantized(self) -> bool:
        """Whether the model is quantized at all."""
        return self.method != "float"

    @property
    def cascades(self) -> bool:
        """Whether a first stage at more bits comes before what the rest of the recipe describes."""
        q = self.quant
        fewer = q.has_budget or min(q.weight_bits or q.bits, q.act_bits or q.bits) < self.cascade.bits
        return self.quantized and self.cascade.share > 0 and fewer and q.start_from is None

    @property
    def first_stage_epochs(self) -> int:
        """Epochs of a cascade's first stage: what ``cascade.share`` comes to, but at least one, and at least one left over."""
        epochs = self.schedule.epochs
        return min(max(round(self.cascade.share * epochs), 1), epochs - 1)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.data.mixup > 0 or self.data.cutmix > 0

    @property
    def dgd_weight(self) -> float:
        """The weight of DGD: ``distill.dgd`` where the method has it, else 0."""
        return self.distill.dgd if self.method in ("dgd", "qvit") else 0.0

    @property
    def needs_features(self) -> bool:
        """Whether the features of student and teacher are matched in some epoch."""
        first = self.activations_first
        return bool(self.distill.feature or (self.quantized and first.epochs and first.feature))

    def model_spec(self) -> ModelSpec:
        """How the model is quantized; with a budget, all of it but the bits (`qvit.training.mixed`).

        Raises:
            SpecError: an override that cannot be executed.
        """
        q = self.quant
        return ModelSpec(
            weight_bits=q.weight_bits or q.bits,
            act_bits=q.act_bits or q.bits,
            edge_bits=q.edge_bits,
            rectify=self.method in ("irm", "qvit") if q.rectify is None else q.rectify,
            equalise=q.equalise,
            weight_quantizer=q.weight_quantizer,
            residual=q.residual,
            overrides=q.overrides,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Checks the keys and values of a recipe.

        Raises:
            RecipeError: an unknown key, or a value out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError(sentence(error, cls)) from None

    @classmethod
    def load(cls, source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Reads a recipe.

        Args:
            source: a path, or the name of a recipe that comes with the package (`recipe_names`).
            overrides: ``key=value``, the key dotted (``quant.bits=2``), the value YAML.

        Raises:
            RecipeError: no such recipe, no YAML, an unknown key or a value out of range.
        """
        text = _read(source)
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"The recipe {source} is no valid YAML: {' '.join(str(error).split())}.") from None
        if not isinstance(values, dict):
            raise RecipeError(f"The recipe {source} holds no keys: it must be a YAML mapping.")
        for override in overrides:
            _apply(values, override)
        return cls.from_dict(values)

    def override(self, *overrides: str) -> Recipe:
        """A copy with some keys changed, given as to `load`."""
        values = self.to_dict()
        for override in overrides:
            _apply(values, override)
        return self.from_dict(values)


def _check_named(key: str, section: ModelSection | None) -> None:
    if section is None or section.name is not None:
        return
    if section.checkpoint is None:
        raise ValueError(f"{key} does not say which model it is: set {key}.name, or {key}.checkpoint to a float one of qvit")
    if section.args or section.pretrained:
        what = "args" if section.args else "pretrained"
        raise ValueError(f"{key}.{what} belongs to a model of timm's: set {key}.name, or remove {key}.{what}")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    files = (resources.files("qvit") / "recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _read(source: str | Path) -> str:
    path = Path(source)
    if isinstance(source, str) and path.name == source and not path.suffix and not path.exists():
        if source not in recipe_names():
            raise RecipeError(f"There is no recipe {source!r}: name one of {', '.join(recipe_names())}, or the path of a file.")
        return (resources.files("qvit") / "recipes" / f"{source}.yaml").read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise RecipeError(f"The recipe {source} cannot be read ({reason}): check the path.") from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not last or not all(sections):
        raise RecipeError(f"{override!r} is no override: write key=value, such as quant.bits=2.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"The value of the override {override!r} is no valid YAML.") from None
    target = values
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise RecipeError(f"The override {override!r} goes into {section!r}, which is a single value and has no keys.")
    target[last] = value
