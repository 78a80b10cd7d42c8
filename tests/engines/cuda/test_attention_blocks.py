"""Which way attention takes for which sequences, and that its blocks have room and leave nothing out."""

from __future__ import annotations

import pytest

from qvit.engines.cuda import few_tiles, tiles
from qvit.engines.cuda.attention_blocks import AttentionBlocks, choose_attention, most_tokens
from qvit.engines.cuda.shape import Shape

MULTIPROCESSORS = 132


def way(found: AttentionBlocks) -> str:
    return "split" if found.split else "ring" if found.ring else "plain"


@pytest.mark.parametrize(
    ("images", "hopper", "expected"),
    [
        (1, True, "split"),
        (1, False, "split"),
        (6, True, "split"),
        (7, True, "plain"),
        (21, True, "plain"),
        (22, True, "ring"),
        (256, True, "ring"),
        (256, False, "plain"),
    ],
)
def test_deit_small(images: int, hopper: bool, expected: str) -> None:
    """Six heads of 197 tokens: the batches at which another way begins on an H100."""
    shape = Shape(images, 197, 384, 6, 1536)
    found = choose_attention(shape, MULTIPROCESSORS, hopper, False)
    assert way(found) == expected
    if expected == "ring":
        assert (found.ring, found.warps, found.resident) == (5, 12, 1)
        assert found.grid[0] <= MULTIPROCESSORS
    if expected == "split":
        assert (found.grid, found.warps) == ((13 * 6 * images, 1, 1), 7)


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 50, 197, 208, 209, 257, 264, 265, 577])
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("images", [1, 3, 64, 513])
@pytest.mark.parametrize("multiprocessors", [2, 46, MULTIPROCESSORS])
def test_blocks_have_room_and_leave_nothing_out(tokens: int, width: int, images: int, multiprocessors: int) -> None:
    for heads in (1, 3, 12):
        shape = Shape(images, tokens, heads * width, heads, 1)
        for hopper in (False, True):
            found = choose_attention(shape, multiprocessors, hopper, False)
            assert found.shared <= (tiles.MOST_SHARED if found.ring else few_tiles.MOST_SHARED)
            assert found.long == (tokens > 264)
            if found.split:
                assert found.grid == (-(-tokens // 16) * images * heads, 1, 1)
                assert 32 * (found.warps - 1) < tokens <= 32 * found.warps
            else:
                blocks_of_head = found.grid[0] // heads
                assert found.grid[0] % heads == 0
                assert (blocks_of_head - 1) * found.pack < images <= blocks_of_head * found.pack
                assert found.grid[1] == 1 or found.pack == 1
            if found.ring:
                # What `src/attention_ring.cuh` asks for.
                parts = -(-tokens // 16)
                assert (found.ring >= 4, found.resident, hopper) == (True, 1, True)
                assert (found.ring - 1) * parts >= 2 * found.warps
                assert 2 * parts + min(2, parts - 1) + 2 > 2 * found.warps


@pytest.mark.parametrize("tokens", [5, 17, 50, 197, 264, 265, 577])
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("images", [1, 7, 22, 4096])
def test_few_queries_are_split_however_many_images_there_are(tokens: int, width: int, images: int) -> None:
    """As those of the last block; but not of sequences that no registers hold."""
    shape = Shape(images, tokens, 3 * width, 3, 1)
    for hopper in (False, True):
        for queries in (1, 2):
            found = choose_attention(shape, MULTIPROCESSORS, hopper, False, queries)
            assert found.shared <= few_tiles.MOST_SHARED
            assert (way(found), found.long) == (("split", False) if tokens <= 264 else ("plain", True))
            if found.split:
                assert found.grid == (3 * images, 1, 1)
                assert 32 * (found.warps - 1) < tokens <= 32 * found.warps
            else:
                blocks = found.grid[0] // 3
                assert (blocks - 1) * found.pack < images <= blocks * found.pack
                assert found.grid[1] == 1  # there is but one tile of queries to share out
        if 17 < tokens <= 264:
            assert choose_attention(shape, MULTIPROCESSORS, hopper, False, 17).grid == (2 * 3 * images, 1, 1)
        whole = choose_attention(shape, MULTIPROCESSORS, hopper, False, tokens)
        assert whole == choose_attention(shape, MULTIPROCESSORS, hopper, False)
        assert images < 4096 or not whole.split
    windows = Shape(images, tokens, 3 * width, 3, 1, windows=1)
    assert way(choose_attention(windows, MULTIPROCESSORS, True, True, 1)) == "plain"


@pytest.mark.parametrize(("tokens", "resident"), [(49, 4), (64, 4), (144, 3), (256, 2), (576, 3)])
def test_windows_are_packed_but_never_split_or_in_a_ring(tokens: int, resident: int) -> None:
    """Up to eight windows a block, as long as a multiprocessor gets 16 blocks."""
    for images in (1, 64, 4096):
        shape = Shape(images, tokens, 96, 3, 384, windows=64)
        found = choose_attention(shape, MULTIPROCESSORS, True, True)
        assert (way(found), found.resident) == ("plain", resident)
        assert found.pack == max(1, min(8, images * 3 // (16 * MULTIPROCESSORS)))
        assert found.shared <= few_tiles.MOST_SHARED


@pytest.mark.parametrize("shared", [few_tiles.MOST_SHARED, tiles.MOST_SHARED])
@pytest.mark.parametrize("width", [32, 64])
def test_the_longest_sequence_just_has_room_or_is_as_long_as_errors_are_bounded_for(width: int, shared: int) -> None:
    most = most_tokens(width, shared)
    assert most == (768 if (width, shared) == (64, few_tiles.MOST_SHARED) else 1024)
    for tokens, fits in ((most, True), (most + 1, most == 1024)):
        for images in (1, 300):
            found = choose_attention(Shape(images, tokens, width, 1, 1), MULTIPROCESSORS, True, False)
            assert (found.long, found.shared <= shared) == (True, fits)
