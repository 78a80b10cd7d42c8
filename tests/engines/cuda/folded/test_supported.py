"""What the kernels do not know is refused by name, all else is let through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qvit.engines.cuda.folded.supported import MOST_WINDOW_TOKENS, check
from qvit.errors import UnsupportedModelError
from qvit.integer.model import IntegerModel
from qvit.integer.ops import Windows
from qvit.spec import HalfStep, PerChannel, PerGroup, PerHead, PerToken


def change(part: Any, **fields: Any) -> None:
    """Another spec: no more of a quantizer or weight is looked at."""
    object.__setattr__(part, "spec", replace(part.spec, **fields))


def windows(model: IntegerModel, size: tuple[int, int]) -> None:
    table = np.zeros(((2 * size[0] - 1) * (2 * size[1] - 1), 3), np.float32)
    object.__setattr__(model.blocks[0].attention, "windows", Windows(size, size, (0, 0), table))


def of_block(model: IntegerModel, *path: str) -> Any:
    part: Any = model.blocks[0]
    for name in path:
        part = getattr(part, name)
    return part


REFUSED: dict[str, tuple[Callable[[IntegerModel], None], str]] = {
    "input per token": (
        lambda m: change(of_block(m, "qkv", "input"), scale=PerToken()),
        "blocks.0.attn.qkv.input's scale per token",
    ),
    "input per group": (
        lambda m: change(of_block(m, "fc2", "input"), scale=PerGroup(64)),
        "blocks.0.mlp.fc2.input's scale per group",
    ),
    "weight per group": (
        lambda m: change(of_block(m, "proj", "weight"), scale=PerGroup(64)),
        "blocks.0.attn.proj.weight's scale per group",
    ),
    "weight of a head": (lambda m: change(m.heads[0].weight, scale=PerGroup(64)), "head.weight's scale per group"),
    "patches": (lambda m: change(m.patch.input, scale=PerToken()), "patch_embed.proj.input's scale per token"),
    "8 bits at odd half steps": (
        lambda m: change(of_block(m, "fc1", "weight"), bits=8, offset=HalfStep()),
        "blocks.0.mlp.fc1.weight, 8 bits at odd half steps",
    ),
    "heads": (
        lambda m: object.__setattr__(m.blocks[0].attention, "head_dim", 48),
        "heads of 48 channels, only of 32 or 64",
    ),
    "windows": (lambda m: windows(m, (1, MOST_WINDOW_TOKENS + 1)), "windows of 577 tokens, only of 576 at most"),
    **{
        f"{what} per token": (
            lambda m, what=what: change(of_block(m, "attention", what), scale=PerToken(), offset=None),
            f"blocks.0.attn.{what}'s scale per token",
        )
        for what in ("q", "k", "map")
    },
    **{
        f"{what} unsigned": (
            lambda m, what=what: change(of_block(m, "attention", what), bits=8, signed=False),
            f"blocks.0.attn.{what}, unsigned at 8 bits",
        )
        for what in ("q", "k")
    },
    **{
        f"q's offset {offset}": (
            lambda m, offset=offset: change(of_block(m, "attention", "q"), offset=offset),
            "blocks.0.attn.q's learned offset",
        )
        for offset in (PerHead(), PerChannel())
    },
}
KNOWN: dict[str, Callable[[IntegerModel], None]] = {
    "as it is": lambda m: None,
    "7 bits at odd half steps": lambda m: change(of_block(m, "fc1", "weight"), bits=7, offset=HalfStep()),
    "weight per tensor": lambda m: change(of_block(m, "fc1", "weight"), scale=of_block(m, "fc1", "input").spec.scale),
    "heads of 64": lambda m: object.__setattr__(m.blocks[0].attention, "head_dim", 64),
    "windows": lambda m: windows(m, (24, 24)),
    "k unsigned at 7 bits": lambda m: change(of_block(m, "attention", "k"), bits=7, signed=False),
    "q at 8 bits": lambda m: change(of_block(m, "attention", "q"), bits=8),
    "v unsigned at 8 bits": lambda m: change(of_block(m, "attention", "v"), bits=8, signed=False),
    "k's offset": lambda m: change(of_block(m, "attention", "k"), offset=PerChannel()),
    "q without an offset": lambda m: change(of_block(m, "attention", "q"), offset=None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known(name: str, freeze: Callable[..., IntegerModel]) -> None:
    model, (break_it, what) = freeze(), REFUSED[name]
    break_it(model)
    with pytest.raises(UnsupportedModelError) as caught:
        check(model)
    assert str(caught.value) == f"The CUDA engine does not run {what} yet: use engine='reference' on device='cuda'."


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known(name: str, freeze: Callable[..., IntegerModel]) -> None:
    model = freeze()
    KNOWN[name](model)
    check(model)
