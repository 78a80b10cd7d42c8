"""What attention is launched with follows from how long a row of the map is, and from what reads its codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qvit
from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.attention import attention_launch
from qvit.engines.cuda.attention_blocks import choose_attention
from qvit.engines.cuda.folded.margins import map_margin
from qvit.engines.cuda.model_constants import ModelConstants
from qvit.engines.cuda.shape import Shape
from qvit.spec import ModelSpec
from tests.engines import cases
from tests.engines.cuda.test_steps import CPU, Known

Launcher = Callable[..., Launch]


@pytest.fixture
def launch(make_student: Callable[..., Any], small_vit: Callable[..., Any]) -> Launcher:
    """``launch(tokens, bits)``: of one image with so many tokens."""

    def make(tokens: int, bits: int = 4, out_bits: bool = False) -> Launch:
        options = cases.SMALL | {"embed_dim": 64, "num_heads": 2, "depth": 1}
        model = qvit.freeze(make_student(small_vit(**options), spec=ModelSpec.of_bits(bits)))
        (block,) = ModelConstants.of(model, CPU).blocks
        codes = torch.zeros(1, dtype=torch.uint8)
        shape, gpu = Shape(1, tokens, 64, 2, 256), Known(multiprocessors=132)
        return attention_launch(shape, gpu, block, (codes, codes, codes), None, codes, 1, out_bits)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize("bits", [4, 8])
def test_margins_follow_the_length_of_a_row(bits: int, launch: Launcher) -> None:
    """Sums of more exponentials, and of more of the map's codes, have more roundings."""
    for tokens in (5, 197, 1024):
        values = launch(tokens, bits).values
        assert values["map_margin"] == map_margin(2**bits - 1, tokens)
    assert launch(1024, bits).values["map_margin"] > 3 * launch(5, bits).values["map_margin"]
    assert launch(1024, bits).values["near"] >= launch(1, bits).values["near"] > 0


@pytest.mark.parametrize(("bits", "places"), [(2, 16), (4, 16), (8, 14)])
def test_fixed_point(bits: int, places: int, launch: Launcher) -> None:
    """Place 1 is the distance of the highest code from the lowest; half a code and half of what is near are added."""
    made = launch(5, bits)
    near = made.values["near"] >> (17 - places)
    assert made.defines["FIXED"] == places
    assert made.values["near"] == 2 * near << (16 - places)
    assert made.values["fixed_step"] == (2**bits - 1) * 2**places
    assert made.values["fixed_first"] == 2**23 + 2 ** (places - 1) + near
    assert (made.values["high"] - made.values["low"]) * 2**places == made.values["fixed_step"]


def test_blocks_and_ways(launch: Launcher) -> None:
    for tokens in (5, 300):
        made, cut = launch(tokens), choose_attention(Shape(1, tokens, 64, 2, 256), 132, True, False)
        assert (made.grid, made.threads, made.shared) == (cut.grid, 32 * cut.warps, cut.shared)
        assert made.defines | cut.defines() == made.defines
        assert made.defines["TOKENS"] == tokens
    assert launch(5, out_bits=True).defines["OUT_BITS"] == 1
    assert launch(5, 8).defines["ROW_CHECK"] == 0
    assert launch(5, 8).values["windows"] == 1
