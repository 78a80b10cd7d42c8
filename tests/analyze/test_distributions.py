"""Histograms and code shares against values worked out by hand, and against NumPy on parts of any size."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qvit.analyze.distributions import CodeCounter, HistogramCounter
from qvit.errors import InputError


def test_moments_and_bins_by_hand() -> None:
    counter = HistogramCounter(bins=8)
    counter.add(np.asarray([[-1.0, 1.0], [-1.0, 1.0]]))
    h = counter.result()
    assert (h.mean, h.std, h.values) == (0, 1, 4)
    assert h.excess_kurtosis == pytest.approx(-2)  # fourth moment 1, and 1 - 3
    np.testing.assert_allclose(h.edges, np.arange(-4, 5))
    assert h.counts.tolist() == [0, 0, 0, 2, 0, 2, 0, 0]
    np.testing.assert_allclose(h.density, h.counts / 4)
    assert h.outside == 0
    assert h.gaussian(np.asarray([0.0, 1.0])) == pytest.approx(
        [1 / math.sqrt(2 * math.pi), math.exp(-0.5) / math.sqrt(2 * math.pi)]
    )


def test_parts_add_up_and_what_lies_outside_the_first_range_is_counted() -> None:
    rng = np.random.default_rng(0)
    values = 1000 + rng.standard_normal(10_007)
    parts = [values[:5000], values[5000:], np.asarray([1100.0, 900.0])]
    counter = HistogramCounter()
    for part in parts:
        counter.add(part)
    h, everything = counter.result(), np.concatenate(parts)
    assert h.mean == pytest.approx(everything.mean(), rel=1e-12)
    assert h.std == pytest.approx(everything.std(), rel=1e-9)
    centred = everything - everything.mean()
    assert h.excess_kurtosis == pytest.approx((centred**4).mean() / centred.var() ** 2 - 3, rel=1e-6)
    assert h.outside == pytest.approx(((everything < h.edges[0]) | (everything > h.edges[-1])).mean())
    assert h.outside >= 2 / 10_009
    assert (h.density * np.diff(h.edges)).sum() == pytest.approx(1 - h.outside)


def test_a_gaussian_fits_itself() -> None:
    counter = HistogramCounter()
    counter.add(np.random.default_rng(1).normal(3, 2, 200_000))
    h = counter.result()
    middle = (h.edges[1:] + h.edges[:-1]) / 2
    assert np.abs(h.density - h.gaussian(middle)).max() < 0.01
    assert abs(h.excess_kurtosis) < 0.05


def test_equal_values_have_no_fit() -> None:
    counter = HistogramCounter()
    counter.add(np.full(5, 2.5))
    h = counter.result()
    assert (h.mean, h.std, h.excess_kurtosis, h.counts.sum()) == (2.5, 0, 0, 5)
    assert not h.gaussian(h.edges).any()


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        HistogramCounter().add(np.asarray([1.0, np.nan]))


def test_codes_by_hand() -> None:
    counter = CodeCounter(-2, 1, heads=2)
    # Head 0 uses all four codes alike, head 1 two of them.
    counter.add(np.asarray([[[[-2, -1], [0, 1]], [[-2, -2], [1, 1]]]]))
    counter.add(np.asarray([[[[-2, -1], [0, 1]], [[-2, -2], [1, 1]]]], dtype=np.float32))
    codes = counter.result()
    assert codes.levels.tolist() == [-2, -1, 0, 1]
    assert codes.bits == 2
    assert codes.counts.tolist() == [[2, 2, 2, 2], [4, 0, 0, 4]]
    assert codes.entropies == pytest.approx([2, 1])
    assert codes.entropy == pytest.approx(1.5)
    assert codes.shares == pytest.approx([6 / 16, 2 / 16, 2 / 16, 6 / 16])
