"""How much each part of a model suffers at each width: the measurements from which `qvit.analyze.budget` chooses widths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvit.analyze.products import products_of
from qvit.analyze.units import Unit, units_of, with_widths
from qvit.calibration import calibrate
from qvit.calibration.calibrate import gather_images
from qvit.convert import family_of, quantize
from qvit.errors import InputError
from qvit.layers.points import float_mode, quantizing_only
from qvit.preprocessing import Preprocessing
from qvit.report_file import read_report, write_report
from qvit.spec import ModelSpec

WIDTHS = (2, 3, 4, 8)
_SPEC_KEYS = ("rectify", "equalise", "weight_quantizer")
_BATCH = 16  # images that go through the model at once

Track = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Sensitivities:
    """What was measured on one model.

    Attributes:
        model: name of its architecture.
        spec: what it was quantized with beside widths (``rectify``, ``equalise``, ``weight_quantizer``); others do not fit.
        images: that it was measured on.
        damages: name of a unit -> bits -> damage, in nats; see `measure_sensitivities`.
    """

    model: str
    spec: Mapping[str, Any]
    images: int
    damages: Mapping[str, Mapping[int, float]]

    @property
    def widths(self) -> tuple[int, ...]:
        """The candidate widths, narrow first."""
        return tuple(sorted(next(iter(self.damages.values()))))

    def save(self, path: str | Path, command: Sequence[str] = ()) -> None:
        """Writes a result file of one row a unit and width; raises `InputError` where it cannot be written."""
        rows = [
            {"model": self.model, "unit": unit, "bits": bits, "damage": damage, "images": self.images, **self.spec}
            for unit, widths in self.damages.items()
            for bits, damage in widths.items()
        ]
        write_report(path, rows, command)

    @classmethod
    def load(cls, path: str | Path) -> Sensitivities:
        """Reads what `save` wrote.

        Raises:
            InputError: there is no such file, it holds something else, or lacks a width of a unit.
        """
        damages: dict[str, dict[int, float]] = {}
        rows = read_report(path)["rows"]
        try:
            for row in rows:
                bits, damage = row["bits"], row["damage"]
                if type(bits) is not int or not 2 <= bits <= 8 or not isinstance(damage, (int, float)):
                    raise TypeError
                damages.setdefault(str(row["unit"]), {})[bits] = float(damage)
            first = rows[0]
            found = cls(str(first["model"]), {key: first[key] for key in _SPEC_KEYS}, int(first["images"]), damages)
        except (KeyError, TypeError, ValueError, IndexError):
            raise InputError(f"{path} holds no sensitivities: name a file that --sensitivities wrote.") from None
        for unit, widths in damages.items():
            if tuple(sorted(widths)) != found.widths:
                raise InputError(f"{path} lacks a width of {unit}: measure the sensitivities again.")
        return found

    def check(self, architecture: Any, spec: ModelSpec, units: Sequence[Unit]) -> None:
        """Raises `InputError` where they were measured on another model, or with what ``spec`` does not have."""
        again = "measure them again, into another file"
        if self.model != architecture.name or list(self.damages) != [unit.name for unit in units]:
            raise InputError(f"The sensitivities are of another model ({self.model}, not {architecture.name}): {again}.")
        for key, value in self.spec.items():
            if getattr(spec, key) != value:
                raise InputError(f"The sensitivities were measured with {key}={value!r}, not {getattr(spec, key)!r}: {again}.")


def measure_sensitivities(
    model: nn.Module,
    batches: Iterable[torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]],
    spec: ModelSpec | None = None,
    preprocessing: Preprocessing | None = None,
    widths: Sequence[int] = WIDTHS,
    images: int = 64,
    track: Track | None = None,
) -> Sensitivities:
    """Measures the damage of every unit at every width: one forward pass over the images each.

    The damage of a unit at b bits is the divergence KL(p || q) of the class probabilities, in nats, the mean over the images: p
    those of the float model, q those of the same model with that unit alone quantized to b bits and calibrated. Where IRM is
    inserted, the float model has it too, so that nothing but quantization counts.

    Why a divergence and not top-1: a few dozen images move top-1 in steps of a percent or more, and one unit alone seldom
    flips an answer, so most units would tie at nought. The divergence sees every shift of the logits, needs no labels, and to
    second order the damages of units that are quantized together add up, which is what choosing among sums of them assumes.

    Args:
        model: a float timm model that `qvit.quantize` takes; left as it is.
        batches: image batches [B, C, H, W], normalised as the preprocessing says, or tuples that begin with one.
        spec: everything but the widths: IRM, equalisation, granularities; by default `ModelSpec()`.
        preprocessing: as in `qvit.quantize`.
        widths: candidates, 2 to 8.
        images: how many images to calibrate and to measure on; the same ones.
        track: ``(items, total) -> items``, for a progress bar over the forward passes.

    Raises:
        UnsupportedModelError, SpecError: as `qvit.quantize`.
        InputError: as `qvit.calibrate`; or there is no width, or one twice.
    """
    spec = ModelSpec() if spec is None else spec
    if not widths or len(set(widths)) < len(widths):
        raise InputError(f"The widths {list(widths)} are not distinct candidates: give some of 2 to 8, each once.")
    sample = images_for(model, batches, images)
    architecture = family_of(model).describe(model)
    units = units_of(products_of(architecture))
    tasks: list[tuple[int, Unit]] = [(bits, unit) for bits in widths for unit in units]
    damages: dict[str, dict[int, float]] = {unit.name: {} for unit in units}
    student, student_bits, reference = None, 0, torch.empty(0)
    for bits, unit in tasks if track is None else track(tasks, len(tasks)):
        if student is None or bits != student_bits:
            uniform = with_widths(spec, units, dict.fromkeys(damages, bits))
            student, student_bits = quantize(model, spec=uniform, preprocessing=preprocessing).eval(), bits
            calibrate(student, [sample], images=len(sample))
            with float_mode(student):
                reference = _log_probabilities(student, sample)
        with quantizing_only(student, unit.points):
            damages[unit.name][bits] = _divergence(reference, _log_probabilities(student, sample))
    return Sensitivities(architecture.name, {key: getattr(spec, key) for key in _SPEC_KEYS}, len(sample), damages)


def images_for(model: Any, batches: Iterable[Any], images: int) -> torch.Tensor:
    """The first images of the batches, [S, C, H, W], for a float model; see `measure_sensitivities`."""
    family = family_of(model)
    family.check(model)
    architecture = family.describe(model)
    return gather_images(batches, images, (architecture.in_chans, *architecture.img_size))


@torch.no_grad()
def _log_probabilities(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """images [S, C, H, W] -> logarithms of the class probabilities [S, classes], float64, on the CPU."""
    device = next(model.parameters()).device
    logits = torch.cat([model(part.to(device)) for part in images.split(_BATCH)])
    return logits.double().log_softmax(-1).cpu()


def _divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """The mean of KL(reference || other) over rows of log probabilities; rounding may not take it below nought."""
    return max(0.0, (reference.exp() * (reference - other)).sum(-1).mean().item())
