"""Attention distance and class-token maps against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qvit.analyze.attention_distance import AttentionDistance, class_token_map, patch_distances


def test_distances_of_patches_by_hand() -> None:
    # Two rows and three columns of patches, 4 pixels high and 3 wide.
    distances = patch_distances((2, 3), (4, 3))
    assert distances.shape == (6, 6)
    assert distances[0].tolist() == pytest.approx([0, 3, 6, 4, 5, np.hypot(6, 4)])
    np.testing.assert_array_equal(distances, distances.T)


def _maps(patches: np.ndarray, prefix: int) -> np.ndarray:
    """Weights between patches [B, H, P, P] with ``prefix`` tokens in front that hold other numbers."""
    b, h, p, _ = patches.shape
    maps = np.full((b, h, p + prefix, p + prefix), 0.25, np.float32)
    maps[:, :, prefix:, prefix:] = patches
    return maps


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_distance_by_hand_whatever_the_prefix_tokens_hold(prefix: int) -> None:
    distances = patch_distances((1, 3), (2, 2))  # patches at 0, 2 and 4 pixels
    itself = np.eye(3)
    uniform = np.full((3, 3), 0.1)  # rows need not add up to one
    neighbour = np.asarray([[0, 1, 0], [0.5, 0, 0.5], [0, 3, 0]])
    measured = AttentionDistance(distances, prefix, heads=3)
    measured.add(_maps(np.stack([itself, uniform, neighbour])[None], prefix))
    # uniform: (0+2+4)/3, (2+0+2)/3, (4+2+0)/3
    assert measured.result() == pytest.approx([0, (2 + 4 / 3 + 2) / 3, 2])
    assert measured.skipped == 0


def test_rows_of_zeros_are_not_counted() -> None:
    distances = patch_distances((1, 2), (1, 1))
    measured = AttentionDistance(distances, 1, heads=2)
    far = np.asarray([[0, 1], [0, 0]])
    measured.add(_maps(np.stack([far, np.zeros((2, 2))])[None], 1))
    result = measured.result()
    assert result[0] == 1
    assert np.isnan(result[1])
    assert measured.skipped == 3


def test_batches_are_averaged_over_images() -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((5, 2, 7, 7)).astype(np.float32)
    distances = patch_distances((2, 3), (3, 5))
    together, apart = AttentionDistance(distances, 1, 2), AttentionDistance(distances, 1, 2)
    together.add(maps)
    for part in (maps[:1], maps[1:]):
        apart.add(part)
    np.testing.assert_allclose(apart.result(), together.result(), rtol=1e-12)
    rows = maps[:, :, 1:, 1:].astype(np.float64)
    expected = ((rows / rows.sum(-1, keepdims=True)) * distances).sum(-1).mean((0, 2))
    np.testing.assert_allclose(together.result(), expected, rtol=1e-9)


def test_the_class_token_s_map_is_the_mean_of_the_heads_over_patches() -> None:
    maps = np.zeros((1, 2, 8, 8))
    maps[0, 0, 0, 2:] = [1, 2, 3, 4, 5, 6]
    maps[0, 1, 0, 2:] = [3, 2, 1, 0, 1, 2]
    maps[0, :, 0, :2] = 9  # to class and distillation token
    assert class_token_map(maps, 2, (2, 3)).tolist() == [[[2, 2, 2], [2, 3, 4]]]
