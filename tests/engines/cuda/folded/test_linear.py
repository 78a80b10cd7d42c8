"""A linear layer in memory: its sums and floats are the reference engine's, in whatever order its columns lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qvit.engines.cuda import comparisons
from qvit.engines.cuda.comparisons import Comparisons
from qvit.engines.cuda.folded.arrays import Constants
from qvit.engines.cuda.folded.linear import MOST_NORMED_PLANES, CodeConstants, LinearConstants, Permuted
from qvit.engines.cuda.layout import from_planes, nibble_order, rest_twice, untiled
from qvit.engines.cuda.step_tables import StepTable, slots
from qvit.engines.reference import ReferenceEngine
from qvit.integer.model import IntegerModel
from qvit.integer.ops import Linear, Quantizer, Weight
from qvit.integer.packing import pack
from qvit.spec import ModelSpec, Operand, PerChannel, QuantSpec

TO = Constants(torch.device("cpu"))
F32 = np.float32


def layer_of(m: int, k: int, bits: int = 2, input_bits: int = 2, signed: bool = False) -> Linear:
    """Random codes."""
    spec = QuantSpec(bits, True, PerChannel(), operand=Operand.WEIGHT)
    codes = np.random.default_rng(0).integers(spec.qn, spec.qp + 1, (m, k), dtype=np.int8)
    weight = Weight(spec, (m, k), pack(codes, bits), np.linspace(0.5, 1.5, m, dtype=F32)[:, None])
    return Linear("layer", Quantizer(QuantSpec(input_bits, signed), np.array([0.25], F32), None), weight, None)


def test_k_in_the_order_of_codes_two_a_byte() -> None:
    layer = LinearConstants.of(layer_of(32, 512, 4, 4), TO)
    order = nibble_order(512)
    assert torch.equal(untiled(layer.b_by_nibbles), untiled(layer.b)[:, order])
    assert torch.equal(untiled(layer.b_by_fours_and_nibbles), untiled(layer.b_by_fours)[:, order])


@pytest.mark.parametrize("changes", [{}, {"weight_quantizer": "statsq"}])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_linear_layer_is_the_reference_engines(
    bits: int, changes: dict[str, Any], freeze: Callable[..., IntegerModel]
) -> None:
    """Sums of what lies in memory, scale and bias give its floats; of two bits also as planes."""
    if bits == 8 and changes:
        pytest.skip("8 bits at odd half steps are refused")
    model = freeze(spec=ModelSpec.of_bits(bits, **changes))
    reference = ReferenceEngine(model)
    (block,) = model.blocks
    for layer in (block.qkv, block.proj, block.fc1, block.fc2):
        (m, k), spec = layer.weight.shape, layer.input.spec
        found = LinearConstants.of(layer, TO)
        assert (found.m, found.k, found.signed, found.half) == (m, k, spec.signed, layer.weight.half_step)
        b = untiled(found.b)
        assert b.shape[0] % 256 == b.shape[1] % 128 == 0
        assert not b[m:].any()
        assert not b[:, k:].any()
        codes = torch.randint(spec.qn, spec.qp + 1, (5, k), dtype=torch.int16)
        sums = (codes.long() @ b[:m, :k].long().T).float() * (0.5 if found.half else 1.0)
        assert torch.equal(sums * found.scale[:m] + found.bias[:m], reference.linear(codes, layer))
        assert (found.b_planes is not None) == (bits == 2 and not changes and not spec.signed)
        if found.b_planes is not None:
            two_bits = from_planes(untiled(found.b_planes), k)[:m]
            assert torch.equal(two_bits, (b[:m, :k] & 3).to(torch.uint8))


@pytest.mark.parametrize(("m", "k", "rows", "columns"), [(1, 1, 256, 128), (256, 128, 256, 128), (257, 129, 512, 256)])
def test_sizes_are_padded_with_zeros(m: int, k: int, rows: int, columns: int) -> None:
    layer = layer_of(m, k)
    found = LinearConstants.of(layer, TO)
    b = untiled(found.b)
    assert b.shape == (rows, columns)
    assert torch.equal(b[:m, :k], torch.from_numpy(layer.weight.codes()))
    assert int(b.count_nonzero()) == np.count_nonzero(layer.weight.codes())
    assert found.scale.shape == found.bias.shape == (rows,)
    assert torch.equal(found.scale[:m], torch.from_numpy(0.25 * layer.weight.scale[:, 0]))
    assert not found.scale[m:].any()
    assert not found.bias.any()  # the layer has none


@pytest.mark.parametrize(
    ("changes", "behind_norm", "planes"),
    [
        ({}, True, True),
        ({"k": 80}, False, False),  # columns end within a word of bits
        ({"signed": True}, False, False),
        ({"bits": 3}, False, False),
        ({"input_bits": 3}, False, False),
        ({"k": MOST_NORMED_PLANES}, True, True),
        ({"k": MOST_NORMED_PLANES + 32}, True, False),
        ({"k": MOST_NORMED_PLANES + 32}, False, True),
    ],
)
def test_which_layers_are_planes_of_bits(changes: dict[str, Any], behind_norm: bool, planes: bool) -> None:
    found = LinearConstants.of(layer_of(**{"m": 3, "k": 96} | changes), TO, behind_norm)
    assert (found.b_planes is not None) == planes


def test_columns_by_fours() -> None:
    """Of a lane's four fragments' pairs become four neighbours; the same for bytes and for planes."""
    layer = layer_of(40, 96)
    found = LinearConstants.of(layer, TO)
    columns = torch.from_numpy(slots(16, 256))
    assert columns[:16].tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    assert torch.equal(untiled(found.b_by_fours), untiled(found.b)[columns])
    assert found.b_planes_by_fours is not None
    codes = from_planes(untiled(found.b_planes_by_fours), 96)
    assert torch.equal(codes, (untiled(found.b)[columns, :96] & 3).to(torch.uint8))
    assert LinearConstants.of(layer_of(40, 96, bits=4), TO).b_planes_by_fours is None


@pytest.mark.parametrize("offset", [None, np.array([0.5, -0.5, 0.25], F32)])
def test_codes_of_a_layers_input(offset: np.ndarray | None) -> None:
    """Steps of one where there is no channel: nothing is divided by zero."""
    spec = QuantSpec(3, True, offset=None if offset is None else PerChannel())
    found = CodeConstants.of(Quantizer(spec, np.array([0.3], F32), offset), 3, TO)
    assert found.step.tolist() == [F32(0.3)] * 3 + [1.0] * 253
    assert found.inverse.tolist() == [F32(1) / F32(0.3)] * 3 + [1.0] * 253
    assert found.offset.tolist() == [*([0.0] * 3 if offset is None else offset.tolist()), *[0.0] * 253]
    assert (found.low, found.high) == (-4.0, 3.0)


@pytest.mark.parametrize("bits", [False, True])
def test_columns_and_what_is_known_of_them_are_permuted_alike(bits: bool) -> None:
    layer = LinearConstants.of(layer_of(40, 96), TO)
    steps = np.arange(160, dtype=np.int32).reshape(40, 4)
    permuted = Permuted(TO, steps)
    assert permuted.column_bytes == 16
    found = permuted.arrays(layer, 64, bits)
    columns = torch.from_numpy(slots(64, 256))
    b = layer.b_planes if bits else layer.b
    assert b is not None
    assert torch.equal(untiled(found["b"]), untiled(b)[columns])
    padded = torch.cat([torch.from_numpy(steps), torch.zeros(216, 4, dtype=torch.int32)])
    assert torch.equal(found["steps"], padded[columns])
    assert permuted.arrays(layer, 64, bits) is found  # made once, for each width
    assert not torch.equal(permuted.arrays(layer, 32, bits)["b"], found["b"])


@pytest.mark.parametrize("planes", [False, True])
def test_tables_of_permuted_columns(planes: bool) -> None:
    """Column by column, what a kernel finds in its place is that column's table."""
    cells, m, width = 8, 40, 64
    rng = np.random.default_rng(0)
    table = StepTable(
        rng.integers(0, 1 << 16, (m, cells), dtype=np.uint16), rng.integers(1, 1 << 16, m), rng.integers(-(1 << 20), 1 << 20, m)
    )
    permuted = Permuted(TO, table)
    assert permuted.column_bytes == 8 + 2 * cells
    found = permuted.arrays(LinearConstants.of(layer_of(m, 96), TO), width, False, planes)["table"].numpy()
    assert found.nbytes == 256 * permuted.column_bytes
    columns = slots(width, 256, planes)
    for place in np.flatnonzero(columns < m):
        part = found.reshape(-1, width * permuted.column_bytes)[place // width]
        numbers = part[: 8 * width].view(np.int32).reshape(width, 2)[place % width]
        entries = part[8 * width :].view(np.uint16).reshape(width // 8, cells, 8)[place % width // 8, :, place % 8]
        assert numbers.tolist() == [table.factor[columns[place]], table.add[columns[place]]]
        assert np.array_equal(entries, table.entries[columns[place]])


@pytest.mark.parametrize("twice", [False, True])
def test_comparisons_of_permuted_columns(twice: bool) -> None:
    """With columns of their own order, and the rest of k twice where it is wanted."""
    layer, width = LinearConstants.of(layer_of(40, 96), TO), 64
    table = Comparisons(np.arange(120, dtype=np.int16).reshape(3, 40), 2, 1)
    permuted = Permuted(TO, table)
    assert permuted.column_bytes == 6
    found = permuted.arrays(layer, width, True, True, twice)
    columns = comparisons.slots(width, 256)
    assert np.array_equal(found["table"].numpy(), comparisons.packed(table, columns))
    assert layer.b_planes is not None
    planes = untiled(layer.b_planes)[torch.from_numpy(columns)]
    assert torch.equal(untiled(found["b"]), rest_twice(planes, 96) if twice else planes)
    assert permuted.arrays(layer, width, True, True, not twice) is not found


def test_a_layer_without_planes_has_none_to_permute() -> None:
    layer = replace(LinearConstants.of(layer_of(40, 96), TO), b_planes=None)
    with pytest.raises(AssertionError):
        Permuted(TO, np.zeros((40, 4), np.int32)).arrays(layer, 64, bits=True)
