"""Attention's constants: scores and values are the reference engine's, and which ways of looking at a row they allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qvit.engines.cuda.folded.arrays import Constants
from qvit.engines.cuda.folded.attention import AttentionConstants, ValueConstants
from qvit.engines.reference import ReferenceEngine
from qvit.integer.model import IntegerModel
from qvit.integer.ops import Attention
from qvit.spec import ModelSpec

TO = Constants(torch.device("cpu"))
F32 = np.float32
VALUES: dict[str, dict[str, Any]] = {
    "learned": {},
    "half step": {"offset": "half_step"},
    "none": {"offset": "none"},
    "per head": {"offset": "per_head"},
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", VALUES)
def test_values_near_a_boundary_are_computed_again(name: str, bits: int, freeze: Callable[..., IntegerModel]) -> None:
    """Places in fixed point, as attention has them, are as near to the reference engine's as they are said to be."""
    (block,) = freeze(spec=ModelSpec.of_bits(bits, overrides={"*.v": VALUES[name]} if VALUES[name] else {})).blocks
    attention, following = block.attention, block.proj.input
    of, found = AttentionConstants.of(attention, TO), ValueConstants.of(attention, following, TO)
    assert of.value_offset == {"learned": 2, "half step": 1, "none": 0, "per head": 2}[name]
    tokens, count = 17, attention.heads * attention.head_dim
    maps, v = attention.map.spec, attention.v.spec
    rows = torch.randint(0, maps.qp + 1, (300, tokens))
    rows = torch.where(torch.rand(300, tokens) < 0.8, torch.zeros_like(rows), rows)
    codes = torch.randint(v.qn, v.qp + 1, (tokens, count))
    sums, row = rows @ codes, rows.sum(1, keepdim=True)
    # The reference engine: floats, then quantize.
    if of.value_offset == 1:
        y = (2 * sums + row).float() * 0.5 * of.value_scale
    else:
        y = sums.float() * of.value_scale
        y = y if of.value_row is None else y + row.float() * of.value_row
    step = torch.from_numpy(np.broadcast_to(following.scale, (count,)).copy())
    y = y if following.offset is None else y - torch.from_numpy(following.offset)
    wanted = (y / step).double()
    place = sums.float() * found.gain + (row.float() * found.row_gain + found.shift)
    got = place.double() * (found.high - found.low) + found.low
    near = found.near(tokens * of.map_high)
    inside = (wanted > found.low - 1) & (wanted < found.high + 1)
    # A row's values of the map add up to one, or to what its few codes make of it; near() goes by that.
    whole = (row.double() * torch.from_numpy(_by_head(attention))).amax(1, keepdim=True) <= 2.01
    error = (got - wanted).abs() * 2**found.binary_places
    assert int((inside & whole).sum()) > 100
    assert float(error[inside & whole].max()) <= near
    assert near < 2 ** (found.binary_places - 1) or bits == 8


def _by_head(attention: Attention) -> np.ndarray:
    """Steps of the map, float64 [H]."""
    return np.broadcast_to(attention.map.scale.reshape(-1), (attention.heads,)).astype(np.float64)


def test_scores_are_whole_numbers_times_a_scale(freeze: Callable[..., IntegerModel]) -> None:
    """With q's half step as ``2 c + 1``, the reference engine's scores bit for bit."""
    model = freeze(spec=ModelSpec.of_bits(4))
    (block,) = model.blocks
    attention, of = block.attention, AttentionConstants.of(block.attention, TO)
    q, k = (torch.randint(-8, 8, (2, attention.heads, 7, attention.head_dim), dtype=torch.int16) for _ in range(2))
    scores = ReferenceEngine(model).scores(q, k, attention)
    doubled = (2 * q.long() + 1) @ k.long().transpose(-2, -1)
    torch.testing.assert_close(doubled.float() * of.score_scale[:, None, None], scores, rtol=3e-7, atol=0)


def scaled(attention: Attention, what: str, by: float) -> Attention:
    """With another scale of one of its parts."""
    quantizer = getattr(attention, what)
    return replace(attention, **{what: replace(quantizer, scale=(quantizer.scale * by).astype(F32))})


def test_boundaries_are_looked_at_where_codes_are_few_and_scores_far_apart(freeze: Callable[..., IntegerModel]) -> None:
    (block,) = freeze(spec=ModelSpec.of_bits(4)).blocks
    attention = block.attention
    least = float(AttentionConstants.of(attention, TO).score_scale.min())
    for distance, checked in ((2.6e-4, True), (2.4e-4, False)):
        found = AttentionConstants.of(scaled(attention, "k", distance / least), TO)
        assert found.row_check == checked, distance
    assert AttentionConstants.of(scaled(attention, "k", 1.0 / least), TO).row_check
    (block,) = freeze(spec=ModelSpec.of_bits(4, overrides={"*.map": 5})).blocks
    found = AttentionConstants.of(scaled(block.attention, "k", 1.0 / least), TO)
    assert (found.map_high, found.row_check) == (31, False)


def test_codes_of_the_map_fit_16_bits_where_steps_are_not_tiny(freeze: Callable[..., IntegerModel]) -> None:
    """A value of the map is at most 1, so a code is at most 1 / step before it is clamped."""
    (block,) = freeze(spec=ModelSpec.of_bits(4)).blocks
    largest = float(block.attention.map.scale.max())
    least = float(block.attention.map.scale.min())
    assert AttentionConstants.of(scaled(block.attention, "map", 1.001 * 2.0**-14 / least), TO).map_short
    assert not AttentionConstants.of(scaled(block.attention, "map", 0.999 * 2.0**-14 / least), TO).map_short
    assert not AttentionConstants.of(scaled(block.attention, "map", 1e-6 / largest), TO).map_short


def test_what_is_near_to_a_boundary(freeze: Callable[..., IntegerModel]) -> None:
    """Wider where more of the map's codes can add up, but for a row's sum of one; at most all fractions that there are."""
    (block,) = freeze(spec=ModelSpec.of_bits(4)).blocks
    found = ValueConstants.of(block.attention, block.proj.input, TO)
    assert found.binary_places == 16
    assert 1 < found.near(1000) < 100
    small, tiny = (replace(block.proj.input, scale=block.proj.input.scale * F32(by)) for by in (1e-3, 1e-9))
    found = ValueConstants.of(block.attention, small, TO)
    fractions = [found.near(most) for most in (0, 5, 10**6, 10**9)]
    assert fractions[0] < fractions[1] < fractions[2] == fractions[3] < 2**15
    assert ValueConstants.of(block.attention, tiny, TO).near(1000) == 2**15
    (block,) = freeze(spec=ModelSpec.of_bits(8)).blocks
    assert ValueConstants.of(block.attention, block.proj.input, TO).binary_places == 14
