"""Comparisons give the codes of the function that they stand for, on every sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import qvit
from qvit.engines.cuda.thresholds import _Codes, activation_thresholds, compare
from qvit.spec import ModelSpec

Factory = Callable[..., Any]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("changes", [{}, {"weight_quantizer": "statsq"}, {"overrides": {"*.fc2.input": {"offset": "none"}}}])
def test_every_sum(
    activation: str, changes: dict[str, Any], make_student: Factory, small_vit: Factory, perturb: Factory
) -> None:
    student = perturb(make_student(small_vit(embed_dim=32, num_heads=1, depth=2), spec=ModelSpec.of_bits(2, **changes)))
    seen = 0
    for block in qvit.freeze(student).blocks:
        thresholds = activation_thresholds(block.fc1, block.fc2.input, activation)
        if thresholds is None:
            continue
        seen += 1
        function = _Codes(block.fc1, block.fc2.input, activation)
        for total in range(-function.reach, function.reach + 1):
            sums = np.full(len(thresholds), total)
            assert np.array_equal(compare(thresholds, sums) + block.fc2.input.spec.qn, function(sums)), total
    assert seen


def test_not_for_more_codes(make_student: Factory, small_vit: Factory) -> None:
    (block,) = qvit.freeze(make_student(small_vit(embed_dim=32, num_heads=1, depth=1), spec=ModelSpec.of_bits(3))).blocks
    assert activation_thresholds(block.fc1, block.fc2.input, "gelu") is None
