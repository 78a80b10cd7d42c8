"""Ramps give the codes of linear channels on every sum, or are not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import qvit
from qvit.engines.cuda.ramps import ramp_codes, ramps
from qvit.engines.cuda.thresholds import Steps, linear_steps
from qvit.spec import ModelSpec

Factory = Callable[..., Any]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("changes", [{}, {"weight_quantizer": "statsq"}])
def test_every_sum_of_v(
    bits: int, changes: dict[str, Any], make_student: Factory, small_vit: Factory, perturb: Factory
) -> None:
    student = perturb(make_student(small_vit(embed_dim=32, num_heads=1, depth=1), spec=ModelSpec.of_bits(bits, **changes)))
    (block,) = qvit.freeze(student).blocks
    v, columns = block.attention.v, slice(64, 96)
    step = np.broadcast_to(v.scale.reshape(-1), 32)
    offset = np.zeros(32, np.float32) if v.offset is None else np.broadcast_to(v.offset.reshape(-1), 32)
    steps = linear_steps(block.qkv, columns, step, offset, v.spec)
    assert isinstance(steps, Steps), steps
    scale = np.broadcast_to(block.qkv.input.scale * block.qkv.weight.scale.reshape(-1), 96)[columns]
    scale = scale / 2 if block.qkv.weight.half_step else scale
    found = ramps(steps, scale / step, v.spec.qn)
    assert isinstance(found, np.ndarray), found
    sums = np.arange(-steps.reach, steps.reach + 1)[:, None].repeat(32, 1)
    assert np.array_equal(ramp_codes(found, sums).astype(np.uint8).view(np.int8), (steps(sums) + v.spec.qn).astype(np.int8))


def channel(rising: list[int], reach: int = 200) -> Steps:
    return Steps(np.zeros(1, np.int64), np.array(rising)[:, None], np.zeros((0, 1), np.int64), reach)


@pytest.mark.parametrize(
    ("rising", "apart"),
    [([-50, -40, -30], 10), ([0], 9), ([10, 10, 11, 11], 0.5), ([201, 201], 0.5), ([-199, 201], 400), ([-60, -17, 26, 69], 43)],
)
def test_every_sum(rising: list[int], apart: float) -> None:
    steps = channel(rising)
    found = ramps(steps, np.array([1 / apart]), 0)
    assert isinstance(found, np.ndarray), found
    sums = np.arange(-200, 201)[:, None]
    assert np.array_equal(ramp_codes(found, sums), steps(sums))


def test_where_there_is_none() -> None:
    assert ramps(channel([0, 10, 15]), np.array([0.1]), 0) == "steps of 1 channels that are too uneven"
    falling = Steps(np.zeros(1, np.int64), np.array([[5]]), np.array([[-5]]), 200)
    assert ramps(falling, np.array([0.1]), 0) == "codes that fall where sums rise"
