"""Entropy of codes against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qvit.analyze.entropy import code_entropy


@pytest.mark.parametrize(
    ("codes", "bits"),
    [
        ([5, 5, 5], 0.0),
        ([], 0.0),
        ([-2, -1, 0, 1], 2.0),
        ([0, 0, 0, 1], 2 - 0.75 * math.log2(3)),
        ([-8] * 4 + [0] * 2 + [7] * 2, 1.5),
    ],
)
def test_by_hand(codes: list[int], bits: float) -> None:
    assert code_entropy(np.asarray(codes, np.int8)) == pytest.approx(bits, abs=1e-12)


def test_of_any_shape_and_never_negative_zero() -> None:
    codes = np.arange(16).reshape(2, 8)
    assert code_entropy(codes) == 4.0
    assert math.copysign(1, code_entropy(np.zeros(3, np.int8))) == 1
