"""How values and codes of a tensor are distributed: what IRM changes in q and k (Q-ViT, figures 1 and 7)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qvit.analyze.entropy import count_entropy
from qvit.errors import InputError

_BINS = 60
_REACH = 4.0  # standard deviations on either side of the mean


@dataclass(frozen=True)
class Histogram:
    """Values of a tensor, counted.

    Attributes:
        edges: of the bins, [bins + 1], evenly spaced.
        counts: values in each bin, int64 [bins].
        values: all values, those outside the bins included.
        mean, std: of all values: the Gaussian of this mean and deviation is the fit of greatest likelihood.
        excess_kurtosis: fourth moment over the squared variance, minus 3: 0 for a Gaussian, above for heavier tails.
    """

    edges: np.ndarray
    counts: np.ndarray
    values: int
    mean: float
    std: float
    excess_kurtosis: float

    @property
    def density(self) -> np.ndarray:
        """Share of all values over the width of a bin, [bins]."""
        return self.counts / (self.values * np.diff(self.edges))

    @property
    def outside(self) -> float:
        """Share of the values outside the bins."""
        return 1 - float(self.counts.sum()) / self.values

    def gaussian(self, x: np.ndarray) -> np.ndarray:
        """Density of the fit at x; zero everywhere where all values are equal, which no Gaussian fits."""
        if not self.std:
            return np.zeros_like(x, dtype=np.float64)
        return np.exp(-0.5 * ((x - self.mean) / self.std) ** 2) / (self.std * math.sqrt(2 * math.pi))


class HistogramCounter:
    """Counts values that come in parts, so that memory does not grow with them.

    The bins span four standard deviations of the first part on either side of its mean.
    """

    def __init__(self, bins: int = _BINS) -> None:
        self.bins = bins
        self._edges: np.ndarray | None = None
        self._counts = np.zeros(bins, np.int64)
        self._values = 0
        # Power sums are taken around the first mean, where they do not cancel.
        self._powers = np.zeros(4)

    def add(self, values: np.ndarray) -> None:
        """Adds values of any shape; raises `InputError` where one is not finite."""
        x = np.asarray(values, np.float64).ravel()
        if not np.isfinite(x).all():
            raise InputError("The model computes values that are not finite: training diverged; use an earlier checkpoint.")
        if self._edges is None:
            self._centre = float(x.mean())
            reach = _REACH * float(x.std()) or 1.0
            self._edges = np.linspace(self._centre - reach, self._centre + reach, self.bins + 1)
        self._counts += np.histogram(x, self._edges)[0]
        self._values += x.size
        shifted = x - self._centre
        self._powers += [float((shifted**power).sum()) for power in (1, 2, 3, 4)]

    def result(self) -> Histogram:
        """What was counted; there must have been something."""
        assert self._edges is not None
        m1, m2, m3, m4 = self._powers / self._values
        variance = max(m2 - m1**2, 0.0)
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        kurtosis = fourth / variance**2 - 3 if variance else 0.0
        return Histogram(
            self._edges, self._counts.copy(), self._values, self._centre + m1, math.sqrt(variance), float(kurtosis)
        )


@dataclass(frozen=True)
class CodeShares:
    """How often each code of a quantizer occurs, head by head, since each head has a step of its own.

    Attributes:
        levels: the codes, int64 [2^b].
        counts: int64 [H, 2^b].
    """

    levels: np.ndarray
    counts: np.ndarray

    @property
    def bits(self) -> int:
        """b, which bounds the entropy."""
        return int(self.levels.size).bit_length() - 1

    @property
    def shares(self) -> np.ndarray:
        """Share of each code over all heads, [2^b]."""
        return self.counts.sum(0) / self.counts.sum()

    @property
    def entropies(self) -> np.ndarray:
        """Entropy of each head's codes in bits, [H]."""
        return np.asarray([count_entropy(row) for row in self.counts])

    @property
    def entropy(self) -> float:
        """The mean of the heads' entropies, in bits."""
        return float(self.entropies.mean())


class CodeCounter:
    """Counts codes that come in parts.

    Args:
        lowest, highest: the range of the codes, both ends included.
        heads: H.
    """

    def __init__(self, lowest: int, highest: int, heads: int) -> None:
        self.lowest, self.width = lowest, highest - lowest + 1
        self._counts = np.zeros((heads, self.width), np.int64)

    def add(self, codes: np.ndarray) -> None:
        """Adds whole numbers [B, H, N, D]."""
        for head, row in enumerate(self._counts):
            row += np.bincount(codes[:, head].ravel().astype(np.int64) - self.lowest, minlength=self.width)

    def result(self) -> CodeShares:
        """What was counted."""
        return CodeShares(np.arange(self.lowest, self.lowest + self.width), self._counts.copy())
