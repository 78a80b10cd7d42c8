"""What is measured: an integer model, from a file or with random weights, and the float model that peers make theirs of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvit.architecture import Architecture
from qvit.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

_CALIBRATION_IMAGES = 2


def write_random_model(
    name: str, bits: int, path: Path, overrides: Mapping[str, Any] | None = None, residual: str = "float32"
) -> None:
    """Quantizes timm's model of that name with random weights, calibrates it on noise and writes its integers.

    Time and memory of an engine do not depend on the values, so this stands for a trained model of the same architecture.

    Args:
        name: timm's name.
        bits: of weights and activations.
        path: the .qvit file to write.
        overrides: of single quantization points, as in `qvit.spec.ModelSpec`.
        residual: of the residual stream, as there.

    Raises:
        RecipeError: timm has no such model.
        UnsupportedModelError, SpecError: qvit cannot quantize it, or not at this width, or not as the overrides say.
    """
    import torch

    import qvit
    from qvit.training.models import build_model
    from qvit.training.sections import DataSection, ModelSection

    torch.manual_seed(0)
    model, preprocessing = build_model(ModelSection(name=name, pretrained=False), DataSection())
    spec = ModelSpec.of_bits(bits, overrides=overrides or {}, residual=residual)
    student = qvit.quantize(model.eval(), spec=spec, preprocessing=preprocessing)
    pixels = torch.randint(0, 256, (_CALIBRATION_IMAGES, *preprocessing.input_size), dtype=torch.uint8)
    images = torch.from_numpy(preprocessing.normalise(pixels.numpy()))
    qvit.calibrate(student, [images], images=_CALIBRATION_IMAGES)
    qvit.freeze(student, provenance={"data": "noise"}).save(path)


def float_model(architecture: Architecture) -> nn.Module:
    """The float model of an architecture, with random weights, in evaluation mode."""
    import torch

    from qvit.convert import build

    torch.manual_seed(0)
    return build(architecture).eval()
