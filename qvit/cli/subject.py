"""What ``qvit inspect`` looks at: a ``.qvit`` file, a checkpoint, or one of timm's models that is not there yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvit.analyze.products import products_of, specs_of
from qvit.cli.checkpoints import INTEGER_SUFFIX, checkpoint_in
from qvit.cli.spec_options import DEFAULT_BITS, arguments_of, spec_of
from qvit.errors import InputError
from qvit.spec import QuantSpec

if TYPE_CHECKING:
    from qvit.integer.model import IntegerModel
    from qvit.preprocessing import Preprocessing
    from qvit.spec import ModelSpec

_CHECKPOINT_SUFFIXES = (".safetensors",)


@dataclass(frozen=True)
class Subject:
    """A quantized model, or a float one as it would be quantized.

    Attributes:
        title: of the table.
        architecture: of the float model.
        specs: name of a quantization point -> its spec.
        rectify: has IRM.
        residual: what the residual stream is rounded to.
        preprocessing: of its images.
        classes: names.
        provenance: what it says of itself.
        model: its integers, where it is a ``.qvit`` file.
        file_bytes: of the ``.qvit`` file.
    """

    title: str
    architecture: Any
    specs: Mapping[str, QuantSpec]
    rectify: bool
    residual: str
    preprocessing: Preprocessing
    classes: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    model: IntegerModel | None = None
    file_bytes: int | None = None


@dataclass(frozen=True)
class Wish:
    """How the options say that a float model is to be quantized; every field is empty where an option was not given."""

    bits: int | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    overrides: Sequence[str] = ()
    model_args: Sequence[str] = ()
    residual: str | None = None

    def refuse(self, what: str) -> None:
        """Raises `InputError` if there is a wish: ``what`` is quantized already."""
        if any((self.bits, self.weight_bits, self.act_bits, self.overrides, self.residual)):
            raise InputError(
                f"{what} is quantized already: leave out --bits, --weight-bits, --act-bits, --override and --residual."
            )
        self.refuse_arguments(what)

    def refuse_arguments(self, what: str) -> None:
        """Raises `InputError` if there are arguments for timm: ``what`` says itself what its model is."""
        if self.model_args:
            raise InputError(f"{what} says itself what its model is: leave out --model-arg.")

    def spec(self) -> ModelSpec:
        """The spec; 4 bits and a float32 stream where nothing was said."""
        return spec_of(self.bits, self.weight_bits, self.act_bits, True, self.overrides, self.residual or "float32")


def find(target: str, wish: Wish) -> Subject:
    """The model that ``target`` names.

    Args:
        target: a ``.qvit`` file, a checkpoint or the folder of a run, or timm's name of a model.
        wish: how a float model is to be quantized.

    Raises:
        QvitError: there is no such file or model, it cannot be read, or the wish does not fit.
    """
    path = Path(target)
    if path.is_dir() or path.suffix in _CHECKPOINT_SUFFIXES:
        return _checkpoint(checkpoint_in(path), wish)
    if path.suffix == INTEGER_SUFFIX or path.exists():
        return _integers(path, wish)
    return _timm(target, wish)


def _integers(path: Path, wish: Wish) -> Subject:
    from qvit.integer.model import IntegerModel

    model = IntegerModel.load(path)
    wish.refuse(str(path))
    return Subject(
        path.name,
        model.architecture,
        model.specs,
        model.header["rectify_eps"] is not None,
        model.residual,
        model.preprocessing,
        model.classes,
        model.provenance,
        model,
        path.stat().st_size,
    )


def _checkpoint(path: Path, wish: Wish) -> Subject:
    from qvit.training.checkpoint import read_checkpoint
    from qvit.training.provenance import provenance_of

    metadata = read_checkpoint(path).metadata
    if metadata.student is not None:
        wish.refuse(str(path))
        title, spec = path.name, metadata.student.spec
    else:
        wish.refuse_arguments(str(path))
        spec = wish.spec()
        title = f"{path.name}, a float model, quantized to {_widths(spec)}"
    specs = specs_of(products_of(metadata.architecture), spec)
    return Subject(
        title,
        metadata.architecture,
        specs,
        spec.rectify,
        spec.residual,
        metadata.preprocessing,
        metadata.classes,
        provenance_of(metadata),
    )


def _timm(name: str, wish: Wish) -> Subject:
    import torch

    from qvit.convert import family_of
    from qvit.training.models import build_model
    from qvit.training.recipe import Recipe

    if "/" in name and ":" not in name:  # hf-hub:owner/name is timm's
        raise InputError(f"There is no file or folder {name}: check the path, or name one of timm's models.")
    section = {"name": name, "args": arguments_of(wish.model_args)}
    recipe = Recipe.from_dict({"model": section})
    assert recipe.model is not None
    with torch.device("meta"):  # shapes alone
        model, preprocessing = build_model(recipe.model, recipe.data)
    family = family_of(model)
    family.check(model)
    architecture, spec = family.describe(model), wish.spec()
    specs = specs_of(products_of(architecture), spec)
    return Subject(f"{name}, quantized to {_widths(spec)}", architecture, specs, spec.rectify, spec.residual, preprocessing)


def _widths(spec: ModelSpec) -> str:
    widths = f"{spec.weight_bits} bits (weights) and {spec.act_bits} bits (activations)"
    chosen = (spec.weight_bits, spec.act_bits) == (DEFAULT_BITS, DEFAULT_BITS) and not spec.overrides
    return f"{widths}; choose others with --bits" if chosen else widths
