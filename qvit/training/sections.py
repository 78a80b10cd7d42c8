"""The sections of a recipe, key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
# No number of a recipe has a use beyond this, and float32 must hold what they are multiplied to.
_MOST = 1e6
Weight = Annotated[float, Field(ge=0, le=_MOST)]
Bits = Annotated[int, Field(ge=2, le=8)]


class Section(BaseModel):
    """Keys that are checked when it is made, and fixed from then on."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """A float timm model.

    Attributes:
        name: timm's name; may be left out where ``checkpoint`` is one of this package, which says what model it holds.
        args: keyword arguments of `timm.create_model` (``patch_size``, ``img_size``, ``num_classes``, ``drop_path_rate``, ..).
        pretrained: take timm's pretrained weights.
        checkpoint: a state dict (``.safetensors``, ``.pth``) or a float checkpoint of this package, loaded last.
    """

    name: str | None = None
    args: dict[str, Any] = {}
    pretrained: bool = False
    checkpoint: Path | None = None


class AugmentSection(Section):
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


class DataSection(Section):
    """Images and what happens to them.

    Attributes:
        train, val: a folder of class folders, a tar file of class folders or a list of such, or ``digits`` (scikit-learn's).
            ``val`` is ``train`` where it is left out; a folder or tar may hold ``train`` and ``val`` folders.
        workers: loader processes, each of every training process; 0 loads in the training process.
        cache: ``device`` decodes all images once, before training, keeps their pixels on the training device and crops and
            flips them there; it knows no other augmentation. Left out, loader processes read images as they are needed.
        cache_size: side of the square that ``cache`` resizes and crops training images to first; needed where they differ in
            size.
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
    cache: Literal["device"] | None = None
    cache_size: Annotated[int, Field(ge=1, le=4096)] | None = None
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

    @model_validator(mode="after")
    def _cacheable(self) -> DataSection:
        if self.cache is None and self.cache_size is not None:
            raise ValueError("data.cache_size is read where data.cache is device: set that, or remove data.cache_size")
        a = self.augment
        unknown = {"auto_augment": a.auto_augment, "color_jitter": a.color_jitter, "erase": a.erase}
        unknown["interpolation"] = a.interpolation if a.interpolation == "random" else None
        if self.cache is not None and (name := next((name for name, value in unknown.items() if value), None)):
            raise ValueError(
                f"data.augment.{name}={unknown[name]!r} does not go with data.cache=device, which crops and flips alone: "
                "remove one of them"
            )
        return self


class QuantSection(Section):
    """How the model is quantized (`qvit.spec.ModelSpec`); not read where the method is ``float``.

    Attributes:
        bits: of weights and activations, where ``weight_bits`` or ``act_bits`` do not say otherwise.
        edge_bits: of the patch embedding and the classification heads.
        rectify: insert IRM; decided by the method where it is left out.
        equalise: balance channels before calibration.
        weight_quantizer: of the blocks' weights, ``lsq`` (learned steps) or ``statsq`` (their mean magnitude).
        residual: ``float16`` rounds the residual stream wherever it is written, in training as in the frozen file, so that a
            GPU reads and writes half as much of it.
        overrides: name pattern -> bits or fields of a `qvit.spec.QuantSpec`.
        budget_mb, budget_bops: choose the bits layer by layer instead (`qvit.analyze.budget`), so that the frozen file has at
            most so many MB of 10^6 bytes, and an image takes at most so many bit operations (`qvit inspect` counts them).
            ``bits``, ``weight_bits`` and ``act_bits`` are not read then; ``overrides`` win over what is chosen.
        sensitivities: file of the measurements that a budget needs; read where it exists, else written.
        calibration_images: training images, not augmented, that calibration sees.
        start_from: checkpoint of a student of the same model at more bits, whose weights are taken over
            (`qvit.training.cascade`, and ``cascade`` for both in one run); the float model is only the teacher then.
    """

    bits: Bits = 4
    weight_bits: Bits | None = None
    act_bits: Bits | None = None
    edge_bits: Bits = 8
    rectify: bool | None = None
    equalise: bool = True
    weight_quantizer: Literal["lsq", "statsq"] = "lsq"
    residual: Literal["float32", "float16"] = "float32"
    overrides: dict[str, int | dict[str, Any]] = {}
    budget_mb: Annotated[float, Field(gt=0)] | None = None
    budget_bops: Annotated[float, Field(gt=0)] | None = None
    sensitivities: Path | None = None
    calibration_images: Annotated[int, Field(ge=1)] = 64
    start_from: Path | None = None

    @property
    def has_budget(self) -> bool:
        """Whether the bits are chosen within a budget."""
        return self.budget_mb is not None or self.budget_bops is not None

    @model_validator(mode="after")
    def _measured_for_a_budget(self) -> QuantSection:
        if self.sensitivities is not None and not self.has_budget:
            raise ValueError("quant.sensitivities belongs to a budget: set quant.budget_mb or quant.budget_bops")
        return self


class DistillSection(Section):
    """Weights of the loss's terms (`qvit.distill.losses.DistillationLoss`).

    Where the method is ``float``, they are read if a teacher is given, ``dgd`` and ``cached_crops`` never;
    ``start_from_teacher`` is read there alone.

    Attributes:
        label: cross-entropy with the labels.
        hard: cross-entropy with the teacher's most likely class.
        soft: divergence from the teacher's probabilities at ``temperature``.
        dgd: distances of the similarity matrices of q and k, where the method is ``dgd`` or ``qvit``.
        feature: distance of the features behind the last block (`qvit.distill.features`). A float model may have another
            shape than its teacher, and learns a linear map between them (`qvit.distill.projection`).
        feature_blocks: behind which blocks features are matched: the ``last``, those at each third of the depth (``thirds``)
            or ``all``; of a teacher of another depth those at the same share of it.
        start_from_teacher: a float ViT starts with an even choice of its teacher's weights
            (`qvit.training.weight_selection`), not with random ones.
        cached_crops: fixed crops of each image, for which the teacher's logits are computed once and kept
            (`qvit.training.targets`); 0 augments anew in every epoch. Only where the loss reads nothing else of the teacher.
    """

    label: Weight = 0.5
    hard: Weight = 0.5
    soft: Weight = 0.0
    temperature: Annotated[float, Field(gt=0, le=_MOST)] = 1.0
    dgd: Weight = 1.0
    feature: Weight = 0.0
    feature_blocks: Literal["last", "thirds", "all"] = "last"
    start_from_teacher: bool = False
    cached_crops: Annotated[int, Field(ge=0, le=1024)] = 0


class OptimSection(Section):
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
    lr: Annotated[float, Field(gt=0, le=_MOST)] = 5e-4
    weight_decay: Weight = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    scale_lr_ratio: Weight = 1.0
    args: dict[str, Any] = {}


class ScheduleSection(Section):
    """Learning rate: linear warm-up, then a cosine, both a step at a time.

    Attributes:
        epochs: passes over the training images.
        warmup_epochs: of them, those in which the rate rises from 0 to ``optim.lr``.
        min_lr: rate at the end.
    """

    epochs: Annotated[int, Field(ge=1)] = 10
    warmup_epochs: Weight = 0.0
    min_lr: Weight = 0.0


class ActivationsFirstSection(Section):
    """A first stage that quantizes activations alone (`qvit.training.stages`); not read where the method is ``float``.

    Attributes:
        epochs: of the stage, the first ones of ``schedule.epochs``; 0 for none.
        feature: weight of feature matching in it, in place of ``distill.feature``.
    """

    epochs: Annotated[int, Field(ge=0)] = 0
    feature: Weight = 1.0


class CascadeSection(Section):
    """A first stage at more bits, from whose student the run then starts (`qvit.training.cascade`).

    Not read where the method is ``float``, where the student has no fewer bits, or where ``quant.start_from`` is set.

    Attributes:
        share: of ``schedule.epochs``, for the first stage; 0 for none.
        bits: of weights and activations in it.
    """

    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bits: Bits = 4


class OscillationSection(Section):
    """Oscillation regularisation (`qvit.training.oscillation`); not read where the method is ``float``.

    Attributes:
        weight: of the penalty at the end of training (the source's is 0.01); 0 for none.
        start: share of training that is done when the weight begins to rise from 0, by half a cosine.
    """

    weight: Weight = 0.0
    start: Annotated[float, Field(ge=0, lt=1)] = 0.25


class AnnealSection(Section):
    """Confidence-guided annealing (`qvit.training.annealing`); not read where the method is ``float``.

    Attributes:
        share: of all steps, the last ones, in which settled weights are held; 0 for none (the source's is about 0.1). The
            learning rate of these steps is constant: ``schedule.min_lr`` or, where that is 0, a hundredth of ``optim.lr``, and
            the cosine ends there.
        width: distance to a rounding threshold, in steps, within which a weight may still move.
    """

    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    width: Annotated[float, Field(gt=0, le=0.5)] = 0.005
