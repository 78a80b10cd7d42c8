"""Step functions give the codes of the function that they stand for, on every sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import qvit
from qvit.engines.cuda.thresholds import Steps, _Codes, activation_steps
from qvit.spec import ModelSpec

Factory = Callable[..., Any]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("changes", [{}, {"weight_quantizer": "statsq"}, {"overrides": {"*.fc2.input": {"offset": "none"}}}])
def test_every_sum(
    activation: str, bits: int, changes: dict[str, Any], make_student: Factory, small_vit: Factory, perturb: Factory
) -> None:
    student = perturb(make_student(small_vit(embed_dim=32, num_heads=1, depth=1), spec=ModelSpec.of_bits(bits, **changes)))
    (block,) = qvit.freeze(student).blocks
    steps = activation_steps(block.fc1, block.fc2.input, activation)
    assert isinstance(steps, Steps), steps
    function = _Codes(block.fc1, slice(None), block.fc2.input.scale, block.fc2.input.offset, block.fc2.input.spec, activation)
    sums = np.arange(-function.reach, function.reach + 1)[:, None].repeat(len(steps.lowest), 1)
    assert np.array_equal(steps(sums), function(sums))


def test_not_for_more_codes(make_student: Factory, small_vit: Factory) -> None:
    (block,) = qvit.freeze(make_student(small_vit(embed_dim=32, num_heads=1, depth=1), spec=ModelSpec.of_bits(8))).blocks
    assert activation_steps(block.fc1, block.fc2.input, "gelu") == "256 codes, more than 16"
