"""A training recipe: a YAML file whose keys are checked, one line of which chooses the method.

`qvit/recipes/*.yaml` are examples; `Recipe` and its sections document every key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qvit.errors import RecipeError
from qvit.spec import ModelSpec

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Bits = Annotated[int, Field(ge=2, le=8)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(_Section):
    """A float timm model.

    Attributes:
        name: timm's name.
        args: keyword arguments of `timm.create_model` (``patch_size``, ``img_size``, ``num_classes``, ``drop_path_rate``, ..).
        pretrained: take timm's pretrained weights.
        checkpoint: a state dict (``.safetensors``, ``.pth``) or a float checkpoint of this package, loaded last.
    """

    name: str
    args: dict[str, Any] = {}
    pretrained: bool = False
    checkpoint: Path | None = None


class AugmentSection(_Section):
    """timm's training transform: random resized crop, flip, then colours, then erasing.

    Attributes:
        scale: share of the image's area that a crop covers, (least, most).
        ratio: aspect ratio of a crop, (least, most).
        hflip: probability of a horizontal flip.
        color_jitter: strength; not used together with ``auto_augment``.
        auto_augment: timm's policy string, such as ``rand-m9-mstd0.5-inc1``.
        erase: probability of random erasing.
        interpolation: Pillow's filter, or ``random``.
    """

    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.08, 1.0)
    ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.75, 4 / 3)
    hflip: Share = 0.5
    color_jitter: Share = 0.0
    auto_augment: str | None = None
    erase: Share = 0.0
    interpolation: Literal["bilinear", "bicubic", "lanczos", "random"] = "bicubic"


class DataSection(_Section):
    """Images and what happens to them.

    Attributes:
        train, val: a folder of class folders, a tar file of class folders or a list of such, or ``digits`` (scikit-learn's).
            ``val`` is ``train`` where it is left out; a folder or tar may hold ``train`` and ``val`` folders.
        workers: loader processes, each of every training process; 0 loads in the training process.
        augment: of training images.
        mixup, cutmix: alpha of the Beta distribution, 0 for none.
        label_smoothing: share of a label spread over all classes.
        repeated_augmentation: times that an image is drawn, each with its own augmentation, where it is drawn at all.
        mean, std, crop_pct, crop_mode, interpolation: of `qvit.preprocessing.Preprocessing`, where the model's own do not
            fit; ``mean`` and ``std`` also hold in training.
    """

    train: str | list[str] | None = None
    val: str | list[str] | None = None
    workers: Annotated[int, Field(ge=0, le=256)] = 4
    augment: AugmentSection = AugmentSection()
    mixup: Weight = 0.0
    cutmix: Weight = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    repeated_augmentation: Annotated[int, Field(ge=1, le=16)] = 1
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    crop_mode: Literal["center", "squash"] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None


class QuantSection(_Section):
    """How the model is quantized (`qvit.spec.ModelSpec`); not read where the method is ``float``.

    Attributes:
        bits: of weights and activations, where ``weight_bits`` or ``act_bits`` do not say otherwise.
        edge_bits: of the patch embedding and the classification heads.
        rectify: insert IRM; decided by the method where it is left out.
        equalise: balance channels before calibration.
        overrides: name pattern -> bits or fields of a `qvit.spec.QuantSpec`.
        calibration_images: training images, not augmented, that calibration sees.
    """

    bits: Bits = 4
    weight_bits: Bits | None = None
    act_bits: Bits | None = None
    edge_bits: Bits = 8
    rectify: bool | None = None
    equalise: bool = True
    overrides: dict[str, int | dict[str, Any]] = {}
    calibration_images: Annotated[int, Field(ge=1)] = 64


class DistillSection(_Section):
    """Weights of the loss's terms (`qvit.distill.losses.DistillationLoss`); not read where the method is ``float``.

    Attributes:
        label: cross-entropy with the labels.
        hard: cross-entropy with the teacher's most likely class.
        soft: divergence from the teacher's probabilities at ``temperature``.
        dgd: distances of the similarity matrices of q and k; decided by the method where it is left out.
    """

    label: Weight = 0.5
    hard: Weight = 0.5
    soft: Weight = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    dgd: Weight | None = None


class OptimSection(_Section):
    """The optimizer.

    Attributes:
        name: any of timm's (``adamw``, ``lamb``, ``sgd``, ..).
        lr: peak learning rate.
        weight_decay: of matrices; biases, norms, position embeddings and quantizers have none.
        betas: of Adam and its kin; the optimizer's own where it is left out.
        clip_grad: largest norm of the gradient.
        scale_lr_ratio: the learning rate of the quantizers' scales and offsets over ``lr``.
        args: further keyword arguments of the optimizer.
    """

    name: str = "adamw"
    lr: Annotated[float, Field(gt=0)] = 5e-4
    weight_decay: Weight = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    scale_lr_ratio: Weight = 1.0
    args: dict[str, Any] = {}


class ScheduleSection(_Section):
    """Learning rate: linear warm-up, then a cosine, both a step at a time.

    Attributes:
        epochs: passes over the training images.
        warmup_epochs: of them, those in which the rate rises from 0 to ``optim.lr``.
        min_lr: rate at the end.
    """

    epochs: Annotated[int, Field(ge=1)] = 10
    warmup_epochs: Weight = 0.0
    min_lr: Weight = 0.0


class Recipe(_Section):
    """Everything that decides how a model is trained.

    Attributes:
        method: ``float`` trains the float model; ``baseline`` a quantized one with logit distillation; ``irm`` adds
            rectification of q and k, ``dgd`` the distillation of their similarities, and ``qvit`` both.
        model: the float model to start from; not needed where a live model is passed to `qvit.train`.
        teacher: the float model as it was before quantization, where this is left out.
        batch_size: images a step and process.
        seed: of everything that is drawn.
        precision: ``bf16`` autocast, ``fp32``, or ``auto``: bf16 on a GPU, fp32 on a CPU.
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
    batch_size: Annotated[int, Field(ge=1)] = 128
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    log_every: Annotated[int, Field(ge=1)] = 50
    eval_every: Annotated[int, Field(ge=1)] = 1
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for name in ("scale", "ratio"):
            least, most = getattr(self.data.augment, name)
            if least > most:
                raise ValueError(f"data.augment.{name} is [{least}, {most}]: give the smaller number first")
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size is {self.batch_size}, but mixup and cutmix pair up images: use an even number")
        if self.schedule.warmup_epochs > self.schedule.epochs:
            raise ValueError(f"schedule.warmup_epochs is more than schedule.epochs ({self.schedule.epochs})")
        if self.schedule.min_lr > self.optim.lr:
            raise ValueError(f"schedule.min_lr is more than optim.lr ({self.optim.lr})")
        return self

    @property
    def quantized(self) -> bool:
        """Whether the model is quantized at all."""
        return self.method != "float"

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.data.mixup > 0 or self.data.cutmix > 0

    @property
    def dgd_weight(self) -> float:
        """The weight of DGD: ``distill.dgd``, or what the method says."""
        return float(self.method in ("dgd", "qvit")) if self.distill.dgd is None else self.distill.dgd

    def model_spec(self) -> ModelSpec:
        """How the model is quantized.

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
            raise RecipeError(_sentence(error)) from None

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


_SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSection,
    "teacher": ModelSection,
    "data": DataSection,
    "augment": AugmentSection,
    "quant": QuantSection,
    "distill": DistillSection,
    "optim": OptimSection,
    "schedule": ScheduleSection,
}


def _sentence(error: ValidationError) -> str:
    """One sentence for the first of the errors that pydantic found."""
    first = error.errors(include_url=False)[0]
    # Where a key may be one of several types, pydantic adds the type to the path.
    path = [str(part) for part in first["loc"] if not str(part).startswith(("int", "str", "list[", "dict["))]
    section = _SECTIONS.get(path[-2], Recipe) if len(path) > 1 else Recipe
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], section.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])!r}?" if near else f"the keys here are {', '.join(section.model_fields)}."
        return f"The recipe has no key {key!r}: {hint}"
    if first["type"] == "missing":
        return f"The recipe lacks the key {key!r}."
    if first["type"] == "value_error":
        return f"The recipe's {first['ctx']['error']}."
    message = first["msg"].removeprefix("Input should be ")
    if first["type"].startswith(("greater_than", "less_than")):
        return f"The recipe's {key}={first['input']!r} is out of range: use {_range(path) or message}."
    return f"The recipe's {key}={first['input']!r} is not allowed: it should be {message}."


def _range(path: list[str]) -> str:
    """The range of the number at ``path``, in words."""
    section = next((_SECTIONS[part] for part in reversed(path) if part in _SECTIONS), Recipe)
    name = next(part for part in reversed(path) if part in section.model_fields)
    node = section.model_json_schema()["properties"][name]
    choices = [item for option in node.get("anyOf", [node]) for item in [option, *option.get("prefixItems", [])]]
    limits = next((item for item in choices if item.keys() & {"minimum", "exclusiveMinimum"}), {})
    low = f"at least {limits['minimum']:g}" if "minimum" in limits else f"more than {limits['exclusiveMinimum']:g}" if limits else ""
    if "maximum" in limits:
        return f"{low} and at most {limits['maximum']:g}"
    return f"{low} and less than {limits['exclusiveMaximum']:g}" if "exclusiveMaximum" in limits else low
