"""The table of the codes behind an activation."""

from __future__ import annotations

from dataclasses import dataclass

from qvit.engines.cuda.folded.arrays import Constants
from qvit.engines.cuda.folded.linear import Permuted
from qvit.engines.cuda.step_tables import step_table
from qvit.engines.cuda.thresholds import activation_steps
from qvit.integer import ops


@dataclass(frozen=True, eq=False)
class ActivationConstants:
    """The table of the codes behind an activation.

    Attributes:
        cells: of a channel's table; 0 where there is no table.
        permuted: the table; ``None`` where there is none.
        why_not: why there is none.
    """

    cells: int
    permuted: Permuted | None
    why_not: str | None = None

    @classmethod
    def of(cls, layer: ops.Linear, following: ops.Quantizer, activation: str, to: Constants) -> ActivationConstants:
        """The table for a layer, an activation and the quantizer of what leaves it."""
        steps = activation_steps(layer, following, activation)
        table = steps if isinstance(steps, str) else step_table(steps)
        if isinstance(table, str):
            return cls(0, None, table)
        return cls(table.entries.shape[1], Permuted(to, table))
