"""A model to fold: one block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import qvit
from qvit.integer.model import IntegerModel
from tests.engines import cases


@pytest.fixture
def freeze(make_student: Callable[..., Any], small_vit: Callable[..., Any], perturb: Callable[..., Any]) -> Any:
    """``freeze(**fields of ModelSpec)``: one block of 96 channels in three heads, images of 32 x 32."""
    small = cases.SMALL | {"embed_dim": 96, "num_heads": 3, "depth": 1}

    def make(**fields: Any) -> IntegerModel:
        return qvit.freeze(perturb(make_student(small_vit(**small), **fields)))

    return make
