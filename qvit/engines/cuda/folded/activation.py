"""The table of the codes behind an activation, or the comparisons that give them."""

from __future__ import annotations

from dataclasses import dataclass

from qvit.engines.cuda.comparisons import Comparisons, comparisons
from qvit.engines.cuda.folded.arrays import Constants
from qvit.engines.cuda.folded.linear import Permuted
from qvit.engines.cuda.step_tables import StepTable, step_table
from qvit.engines.cuda.thresholds import activation_steps
from qvit.integer import ops


@dataclass(frozen=True, eq=False)
class ActivationConstants:
    """The table of the codes behind an activation, and the comparisons that give them where codes have two bits.

    Attributes:
        cells: of a channel's table; 0 where there is no table.
        permuted: the table; ``None`` where there is none.
        why_not: why there is none.
        compared: the comparisons' thresholds; ``None`` where there are none.
        rising, falling: as many, for steps up and down.
    """

    cells: int
    permuted: Permuted | None
    why_not: str | None = None
    compared: Permuted | None = None
    rising: int = 0
    falling: int = 0

    @classmethod
    def of(cls, layer: ops.Linear, following: ops.Quantizer, activation: str, to: Constants) -> ActivationConstants:
        """Those for a layer, an activation and the quantizer of what leaves it."""
        steps = activation_steps(layer, following, activation)
        table = steps if isinstance(steps, str) else step_table(steps)
        compared = steps if isinstance(steps, str) else comparisons(steps)
        return cls(
            cells=table.entries.shape[1] if isinstance(table, StepTable) else 0,
            permuted=Permuted(to, table) if isinstance(table, StepTable) else None,
            why_not=table if isinstance(table, str) else None,
            compared=Permuted(to, compared) if isinstance(compared, Comparisons) else None,
            rising=compared.rising if isinstance(compared, Comparisons) else 0,
            falling=compared.falling if isinstance(compared, Comparisons) else 0,
        )
