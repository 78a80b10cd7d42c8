"""The geometry of windows, against timm's and against what it means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock, get_relative_position_index, window_partition

from qvit.integer.ops import Windows
from qvit.integer.windows import relative_index, window_mask, window_tokens

SHAPES = [
    ((8, 8), (4, 4), (0, 0)),
    ((8, 8), (4, 4), (2, 2)),
    ((6, 9), (3, 3), (1, 1)),
    ((4, 8), (4, 4), (0, 2)),
    ((8, 4), (4, 4), (2, 0)),
    ((8, 12), (2, 4), (1, 2)),
    ((5, 7), (5, 7), (0, 0)),
    ((2, 2), (1, 1), (0, 0)),
]


@pytest.mark.parametrize(("sides", "window", "shift"), SHAPES)
def test_tokens_are_those_of_timm(sides: tuple, window: tuple, shift: tuple) -> None:
    tokens = window_tokens(sides, window, shift)
    numbers = torch.arange(sides[0] * sides[1]).reshape(1, *sides, 1)
    rolled = torch.roll(numbers, (-shift[0], -shift[1]), dims=(1, 2))
    np.testing.assert_array_equal(tokens, window_partition(rolled, window).flatten(1).numpy())
    assert sorted(tokens.reshape(-1)) == list(range(sides[0] * sides[1]))


@pytest.mark.parametrize(("sides", "window", "shift"), SHAPES)
def test_masks_are_those_of_timm(sides: tuple, window: tuple, shift: tuple) -> None:
    block = SwinTransformerBlock(8, sides, num_heads=1, window_size=window, shift_size=shift, always_partition=True)
    mask = window_mask(sides, window, shift)
    if not any(shift):
        assert mask is None
        assert block.attn_mask is None
        return
    assert mask is not None
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, block.attn_mask.numpy())
    assert set(np.unique(mask)) == {0.0, -100.0}


def test_a_shifted_window_of_the_whole_map_is_masked_too() -> None:
    block = SwinTransformerBlock(8, (4, 4), num_heads=1, window_size=4, shift_size=2, always_partition=True)
    np.testing.assert_array_equal(window_mask((4, 4), (4, 4), (2, 2)), block.attn_mask.numpy())


@pytest.mark.parametrize(("sides", "window", "shift"), [case for case in SHAPES if any(case[2])])
def test_masked_are_the_pairs_that_were_no_neighbours(sides: tuple, window: tuple, shift: tuple) -> None:
    """Two tokens of a window attend to each other if their places in the map are as far apart as those in the window."""
    tokens, mask = window_tokens(sides, window, shift), window_mask(sides, window, shift)
    assert mask is not None
    place = np.indices(window).reshape(2, -1)
    for which, row in enumerate(tokens):
        where = np.stack(np.unravel_index(row, sides))
        near = (np.abs(where[:, :, None] - where[:, None]) == np.abs(place[:, :, None] - place[:, None])).all(0)
        np.testing.assert_array_equal(mask[which] == 0, near)


@pytest.mark.parametrize("window", [(7, 7), (4, 4), (2, 5), (1, 3), (1, 1)])
def test_relative_positions_are_those_of_timm(window: tuple) -> None:
    np.testing.assert_array_equal(relative_index(window), get_relative_position_index(*window).numpy())


def test_arrays_are_shared_and_cannot_be_written() -> None:
    first, second = window_mask((8, 8), (4, 4), (2, 2)), window_mask((8, 8), (4, 4), (2, 2))
    assert first is second
    for array in (first, window_tokens((8, 8), (4, 4), (2, 2)), relative_index((4, 4))):
        assert array is not None
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_bias_of_a_table() -> None:
    windows = Windows((4, 6), (2, 3), (0, 0), np.arange(2 * 15, dtype=np.float32).reshape(15, 2))
    assert (windows.area, windows.count) == (6, 4)
    bias = windows.bias()
    assert bias.shape == (2, 6, 6)
    assert bias.flags.c_contiguous
    assert (bias[:, 0, 0] == windows.bias_table[7]).all()  # no distance: the middle row
    assert (bias[1, 0, 5] == windows.bias_table[0, 1]).all()  # the query is one above and two left of the key
    assert (bias[1, 5, 0] == windows.bias_table[14, 1]).all()
    assert windows.mask() is None
