"""Swapping single modules: what all families have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from qvit.layers.linear import QuantLinear
from qvit.layers.mlp import QuantMlp
from qvit.layers.patch_embed import QuantPatchProjection
from qvit.preprocessing import Preprocessing
from qvit.spec import ModelSpec, Operand, QuantSpec


def mlp_ratio(embed_dim: int, hidden: int) -> float:
    """The ratio from which timm, which truncates ``embed_dim * ratio``, gets ``hidden`` back."""
    return (hidden + 0.5) / embed_dim


class Swap:
    """Makes quantized modules out of float ones, with specs resolved by name.

    Attributes:
        statistical: the blocks' weights have steps that follow from them (StatsQ).
        specs: name of every point that was resolved -> its spec.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self.statistical = spec.weight_quantizer == "statsq"
        self.specs: dict[str, QuantSpec] = {}

    def resolve(self, name: str, operand: Operand, edge: bool = False) -> QuantSpec:
        """The spec of a point; raises `SpecError` as `ModelSpec.resolve`."""
        self.specs[name] = self._spec.resolve(name, operand, edge)
        return self.specs[name]

    def resolver(self, prefix: str) -> Callable[[str, Operand], QuantSpec]:
        """`resolve` of the points of one module, by what their names end in."""
        return lambda suffix, operand: self.resolve(f"{prefix}.{suffix}", operand)

    def linear(self, linear: nn.Linear, name: str, tokens: int | None, edge: bool = False) -> QuantLinear:
        """A linear layer; ``tokens``: those of its input that scales may follow, ``edge``: it is the model's last layer."""
        weight = self.resolve(f"{name}.weight", Operand.WEIGHT, edge)
        source = self.resolve(f"{name}.input", Operand.INPUT, edge)
        return QuantLinear(linear, weight, source, tokens, statistical=self.statistical and not edge)

    def mlp(self, mlp: Any, name: str, tokens: int | None, activation: str) -> QuantMlp:
        """The MLP of a block."""
        fc1, fc2 = self.linear(mlp.fc1, f"{name}.fc1", tokens), self.linear(mlp.fc2, f"{name}.fc2", tokens)
        return QuantMlp(mlp, fc1, fc2, activation)

    def patch_projection(self, model: Any, preprocessing: Preprocessing) -> None:
        """Replaces the convolution of ``model.patch_embed``."""
        name = "patch_embed.proj"
        model.patch_embed.proj = QuantPatchProjection(
            model.patch_embed.proj,
            self.resolve(f"{name}.weight", Operand.WEIGHT, edge=True),
            self.resolve(f"{name}.input", Operand.INPUT, edge=True),
            preprocessing.mean,
            preprocessing.std,
        )
