"""Finding the blocks of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from qvit.layers.blocks import transformer_blocks


def test_of_a_vit_and_of_a_swin(small_vit: Callable[..., Any], small_swin: Callable[..., Any]) -> None:
    vit, swin = small_vit(), small_swin()
    assert transformer_blocks(vit) == list(vit.blocks)
    assert transformer_blocks(swin) == [swin.layers[0].blocks[0], swin.layers[0].blocks[1], swin.layers[1].blocks[0]]


def test_of_anything_else() -> None:
    class Layers(nn.Module):
        def __init__(self, layers: Any) -> None:
            super().__init__()
            self.layers = layers

    assert transformer_blocks(nn.Linear(2, 2)) == []
    assert transformer_blocks(Layers(nn.Sequential(nn.Linear(2, 2)))) == []
    assert transformer_blocks(Layers(3)) == []
