"""What quantizing one part of a model alone costs in accuracy (Q-ViT, figure 5), and one layer alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from qvit.layers.points import quantization_points, quantizing_only

# Parts in the order of a figure; `part_of` says which points they hold.
PARTS = {
    "mlp": "MLP (weights and inputs)",
    "attention_weights": "attention weights (qkv, proj)",
    "attention_inputs": "inputs of qkv and proj",
    "attention_activations": "attention activations (q, k, v, map)",
    "between": "patch merging between stages",
    "edges": "first and last layer",
}


@dataclass(frozen=True)
class PartSensitivity:
    """Top-1 of a trained model with some of its points quantized and all others in floating point.

    Attributes:
        none: top-1 in percent with nothing quantized, IRM included.
        all: with everything quantized.
        parts: with one part alone, key of `PARTS` -> top-1; only parts that the model has.
        layers: with one layer alone, name of a block or of an edge layer -> top-1, in the order of the model.
    """

    none: float
    all: float
    parts: dict[str, float]
    layers: dict[str, float]


def part_of(point: str) -> str:
    """The key of `PARTS` that a quantization point (`qvit.layers.points`) belongs to."""
    path = point.split(".")
    if "mlp" in path:
        return "mlp"
    if path[-1] in ("q", "k", "v", "map"):
        return "attention_activations"
    if "attn" in path:
        return "attention_weights" if path[-1] == "weight" else "attention_inputs"
    return "between" if "downsample" in path else "edges"


def layer_of(point: str) -> str:
    """The block (``blocks.3``) or edge layer (``head``, ``patch_embed.proj``) that a point belongs to."""
    block = point.split(".attn.")[0].split(".mlp.")[0]
    return block if block != point else point.rpartition(".")[0]


def part_sensitivity(student: nn.Module, top1: Callable[[], float]) -> PartSensitivity:
    """Measures a calibrated student once for every part and layer; nothing is trained or calibrated again.

    Args:
        student: the quantized model.
        top1: measures the student as it is now, in percent; called `evaluations` times.
    """
    parts, layers = _groups(student, part_of, PARTS), _groups(student, layer_of)

    def measure(points: Iterable[str]) -> float:
        with quantizing_only(student, frozenset(points)):
            return top1()

    return PartSensitivity(
        none=measure(()),
        all=measure(quantization_points(student)),
        parts={name: measure(points) for name, points in parts.items()},
        layers={name: measure(points) for name, points in layers.items()},
    )


def evaluations(student: nn.Module) -> int:
    """How often `part_sensitivity` measures the student."""
    return 2 + len(_groups(student, part_of)) + len(_groups(student, layer_of))


def _groups(student: nn.Module, group_of: Callable[[str], str], order: Iterable[str] = ()) -> dict[str, list[str]]:
    """Group -> its points; groups in the given order, else in that of the model, and none empty."""
    groups: dict[str, list[str]] = {key: [] for key in order}
    for name in quantization_points(student):
        groups.setdefault(group_of(name), []).append(name)
    return {key: points for key, points in groups.items() if points}
