"""Where tokens lie, and which blocks belong together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from qvit.distill.features import FeatureTap
from qvit.distill.layout import TokenLayout, Which, matched_blocks, token_layouts


def test_layouts_are_those_of_the_features(small_swin: Callable[..., nn.Module]) -> None:
    model = small_swin()
    layouts = token_layouts(model)
    assert layouts == [TokenLayout(0, False, 8, 8, 16)] * 2 + [TokenLayout(0, False, 4, 4, 32)]
    with FeatureTap(model, range(2)) as tap:
        model(torch.randn(1, 3, 32, 32))
        assert [f.shape[1:] for f in tap.collect()] == [(layout.tokens, layout.width) for layout in layouts]


@pytest.mark.parametrize(
    ("name", "options", "prefix", "has_class_token"),
    [
        ("deit_tiny_patch16_224", {}, 1, True),
        ("deit_tiny_distilled_patch16_224", {}, 2, True),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0, False),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "reg_tokens": 3}, 3, False),
    ],
)
def test_prefix_tokens(name: str, options: dict[str, Any], prefix: int, has_class_token: bool) -> None:
    model = timm.create_model(name, img_size=(16, 24), patch_size=8, embed_dim=24, depth=2, num_heads=2, **options)
    layout = TokenLayout(prefix, has_class_token, 2, 3, 24)
    assert token_layouts(model) == [layout] * 2
    with FeatureTap(model) as tap:
        model(torch.randn(1, 3, 16, 24))
        assert tap.collect()[0].shape == (1, layout.tokens, 24)


def test_a_model_without_tokens_has_no_layout() -> None:
    assert token_layouts(nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("blocks", "others", "which", "pairs"),
    [
        (12, 12, "last", [(11, 11)]),
        (12, 12, "thirds", [(3, 3), (7, 7), (11, 11)]),
        (12, 24, "thirds", [(3, 7), (7, 15), (11, 23)]),
        (2, 3, "thirds", [(0, 1), (1, 2)]),
        (1, 12, "thirds", [(0, 11)]),
        (3, 3, "all", [(0, 0), (1, 1), (2, 2)]),
        (4, 2, "all", [(0, 0), (1, 0), (2, 1), (3, 1)]),
        (5, 1, "all", [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]),
    ],
)
def test_blocks_at_the_same_share_of_the_depth(blocks: int, others: int, which: Which, pairs: list[tuple[int, int]]) -> None:
    assert matched_blocks(blocks, others, which) == pairs
