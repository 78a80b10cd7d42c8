"""Buffers, what can be seen in them, and which layers are multiplied as planes of bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.folded.arrays import Constants
from qvit.engines.cuda.folded.linear import LinearConstants
from qvit.engines.cuda.layout import bit_chunks, chunks, nibbles, planes, tiled
from qvit.engines.cuda.shape import Shape
from qvit.engines.cuda.steps import HIGHEST, Steps
from qvit.engines.cuda.tiles import HopperTile, choose_bits
from qvit.engines.cuda.tuned import Choice, Tuned
from tests.engines.cuda.folded.test_linear import layer_of

CPU = torch.device("cpu")


class Known:
    """What a plan asks of a GPU; it runs nothing."""

    device, stream = CPU, None

    def __init__(self, hopper: bool = True, multiprocessors: int = 4, choices: tuple[Choice, ...] = ()) -> None:
        self.hopper, self.multiprocessors, self.tuned = hopper, multiprocessors, Tuned(choices)


def steps_of(rows: int = 512, gpu: Any = None, one_bit: bool = True) -> Steps:
    steps = Steps(gpu or Known(), CPU, one_bit, poison=True)
    steps._shape = Shape(1, rows, 96, 3, 384)
    return steps


def linear(m: int = 128, k: int = 96, bits: int = 2) -> LinearConstants:
    return LinearConstants.of(layer_of(m, k, bits), Constants(CPU))


@pytest.mark.parametrize("rows", [1, 64, 65, 200, 256])
def test_the_last_tile_of_a_product_is_within_its_codes(rows: int) -> None:
    """Of any height up to the highest, beginning at any multiple of 64; unused memory is poisoned in tests."""
    codes = steps_of()._codes(rows, 130)
    assert codes.shape[1] == 256
    assert len(codes) % 64 == 0
    for height in (64, 128, 192, HIGHEST):
        for first in range(0, rows, 64):
            assert len(codes) >= first + height
    assert (codes == 0xA5).all()
    assert steps_of()._floats(2, 3).isnan().all()


def added(steps: Steps) -> dict[str, Any]:
    steps._add(Launch("pool", {}, (1, 1, 1), 32, 0, {}))
    return steps.steps[-1].taps


@pytest.mark.parametrize("signed", [False, True])
def test_codes_in_tiles_are_seen_as_a_matrix(signed: bool) -> None:
    steps = steps_of()
    wanted = torch.randint(-128 if signed else 0, 128 if signed else 256, (2, 5, 130), dtype=torch.int16)
    memory = steps._codes(10, 130)
    whole = torch.full_like(memory, 7)
    whole[:10, :130] = wanted.reshape(10, 130).to(torch.uint8)
    taps = added(steps)
    steps._tap("there", memory, (2, 5, 130), signed)
    memory.copy_(tiled(whole))  # read when it is asked for
    assert torch.equal(taps["there"](), wanted)


def test_q_and_its_half_step_are_seen_as_q() -> None:
    steps, q = steps_of(), torch.arange(-8, 8, dtype=torch.int16).reshape(1, 1, 2, 8)
    taps = added(steps)
    steps._tap("q", (2 * q + 1).to(torch.uint8), (1, 1, 2, 8), signed=True, doubled=True)
    assert torch.equal(taps["q"](), q)


@pytest.mark.parametrize("one_bit", [False, True])
def test_inputs_are_seen_whether_bytes_or_planes(one_bit: bool) -> None:
    steps, layer, rows = steps_of(one_bit=one_bit), linear(k=288), 512
    wanted = torch.randint(0, 4, (2, 256, 288), dtype=torch.int16)
    memory = steps._codes(rows, 288)
    codes = torch.zeros(len(memory), 288, dtype=torch.uint8)
    codes[:rows] = wanted.reshape(rows, 288).to(torch.uint8)
    if one_bit:
        assert steps._bits(layer) is not None
        of_bits = tiled(planes(codes)).reshape(-1)  # fewer bytes than there is room for
        memory.reshape(-1)[: len(of_bits)] = of_bits
    else:
        memory.copy_(tiled(torch.nn.functional.pad(codes, (0, memory.shape[1] - 288))))
    taps = added(steps)
    steps._tap_input("input", memory, layer, 2, 256)
    assert torch.equal(taps["input"](), wanted)
    assert steps._chunks(layer) == (bit_chunks(288) if one_bit else chunks(288)) == (1 if one_bit else 3)


def test_inputs_are_seen_two_a_byte() -> None:
    steps, layer, rows = steps_of(), linear(k=512, bits=4), 70
    steps._packed.add(layer)
    wanted = torch.randint(0, 16, (2, 35, 512), dtype=torch.int16)
    memory = steps._codes(rows, 512)
    codes = torch.zeros(len(memory), 512, dtype=torch.uint8)
    codes[:rows] = wanted.reshape(rows, 512).to(torch.uint8)
    packed = tiled(nibbles(codes)).reshape(-1)
    memory.reshape(-1)[: len(packed)] = packed
    taps = added(steps)
    steps._tap_input("input", memory, layer, 2, 35)
    assert torch.equal(taps["input"](), wanted)
    assert steps._chunks(layer) == 2
    assert steps._chunks(linear(k=512, bits=4)) == 4


def test_where_products_are_of_bits() -> None:
    layer = linear()
    assert steps_of()._bits(layer) == choose_bits(512, 128, 96, 4)
    assert steps_of()._bits(linear(bits=3)) is None
    assert steps_of(one_bit=False)._bits(layer) is None
    assert steps_of(gpu=Known(hopper=False))._bits(layer) is None
    assert steps_of(rows=64)._bits(layer) is None  # too little work


def test_all_rows_decide_for_every_chunk() -> None:
    """Codes of one kind lie between launches: a chunk with too little work goes the way of all; tiles may be its own."""
    layer = linear()
    steps, most = steps_of(rows=2048), choose_bits(2048, 128, 96, 4)
    assert most is not None
    assert steps._bits(layer, 64) == most
    half = choose_bits(300, 128, 96, 4)
    assert half not in (None, most)
    assert steps._bits(layer, 300) == half
    few = steps_of(rows=64)
    assert choose_bits(512, 128, 96, 4) is not None
    assert few._bits(layer, 512) is None


def test_measured_planes_are_looked_up_by_all_rows() -> None:
    layer, tile = linear(), HopperTile(1, 64, 2, bits=True)
    steps = steps_of(2048, Known(choices=(Choice("planes", 2048, 128, 96, True, tile),)))
    assert steps._bits(layer) == steps._bits(layer, 300) == steps._bits(layer, 64) == tile
    steps = steps_of(2048, Known(choices=(Choice("planes", 300, 128, 96, True, tile),)))
    assert steps._bits(layer, 300) == choose_bits(300, 128, 96, 4)
    steps = steps_of(2048, Known(choices=(Choice("planes", 2048, 128, 96, True, None),)))
    assert steps._bits(layer) is steps._bits(layer, 300) is None
    assert steps._chunks(layer) == 1
    assert np.prod(layer.b.shape) == 256 * 128
