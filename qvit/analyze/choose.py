"""The integer program: one width a unit, so that damages add up to the least and no cost exceeds its limit."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


def choose(damages: np.ndarray, costs: Sequence[np.ndarray], limits: Sequence[int]) -> np.ndarray | None:
    """Chooses an option for every unit.

    minimise  sum over u, w of damages[u, w] x[u, w]    over x[u, w] in {0, 1}
    with      sum over w of x[u, w] = 1                 for every unit u
              sum over u, w of costs[c][u, w] x[u, w] <= limits[c]    for every cost c

    Args:
        damages: [U, W], not negative.
        costs: one whole-numbered array [U, W] a limit, not negative.
        limits: whole numbers.

    Returns:
        The chosen option of every unit, [U]; ``None`` where no choice keeps the limits. Limits are kept exactly. The sum of
        damages is the least up to a relative error of 1e-9, since the solver computes in floating point.

    Source: Dong et al., "HAWQ-V2", 2020, choose widths by a sum of sensitivities under a budget; Yao et al., "HAWQ-V3", 2021,
    by an integer program.
    """
    units, options = damages.shape
    rows, bounds = [], []
    for cost, limit in zip(costs, limits, strict=True):
        # What exceeds each unit's cheapest option, over the common divisor: small whole numbers, on which the solver's
        # tolerance decides nothing.
        least = cost.min(axis=1)
        left = limit - sum(map(int, least))
        if left < 0:
            return None
        above = cost - least[:, None]
        divisor = math.gcd(*map(int, above.ravel())) or 1
        rows.append(above.ravel() // divisor)
        bounds.append(left // divisor)
    one_each = np.kron(np.eye(units), np.ones(options))
    constraints = [LinearConstraint(one_each, 1, 1)]
    # Half a unit of slack: whole numbers cannot use it, and rounding cannot take away what they need.
    constraints += [
        LinearConstraint(row[None, :].astype(float), ub=bound + 0.5) for row, bound in zip(rows, bounds, strict=True)
    ]
    # The solver stops at an absolute gap of 1e-6.
    largest = float(damages.max())
    scaled = damages * (1e4 / largest) if largest > 0 else damages
    with _silent():
        result = milp(
            scaled.ravel(),
            integrality=np.ones(units * options),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        return None
    chosen = result.x.reshape(units, options).argmax(axis=1)
    for row, bound in zip(rows, bounds, strict=True):
        if int(row.reshape(units, options)[np.arange(units), chosen].sum()) > bound:
            raise AssertionError("the solver's choice exceeds a limit")
    return chosen


@contextmanager
def _silent() -> Iterator[None]:
    """Within it nothing reaches the process's standard output: HiGHS 1.12 leaves a debugging line there now and then."""
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
