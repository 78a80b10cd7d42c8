"""The constants that the op table derives from a file's tensors, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from qvit.integer.ops import Linear, Quantizer, Weight
from qvit.integer.packing import pack
from qvit.spec import HalfStep, Operand, PerChannel, PerGroup, PerHead, PerTensor, QuantSpec


def _linear(offset_shape: tuple[int, ...] | None, weight_scale: str, bias: bool, m: int = 5, k: int = 128) -> Linear:
    rng = np.random.default_rng(0)
    granularity = {"channel": PerChannel(), "tensor": PerTensor(), "group": PerGroup(64)}[weight_scale]
    shape = {"channel": (m, 1), "tensor": (1,), "group": (m, k // 64)}[weight_scale]
    spec = QuantSpec(3, signed=True, scale=granularity, operand=Operand.WEIGHT)
    codes = rng.integers(-4, 4, (m, k))
    weight = Weight(spec, (m, k), pack(codes, 3), rng.uniform(0.1, 1, shape).astype(np.float32))
    offset = None if offset_shape is None else rng.normal(size=offset_shape).astype(np.float32)
    kind = None if offset_shape is None else PerChannel() if offset_shape == (k,) else PerTensor()
    source = Quantizer(QuantSpec(4, offset=kind), np.asarray([0.25], np.float32), offset)
    return Linear("layer", source, weight, rng.normal(size=m).astype(np.float32) if bias else None)


@pytest.mark.parametrize("weight_scale", ["channel", "tensor", "group"])
@pytest.mark.parametrize("offset_shape", [(1,), (128,)])
@pytest.mark.parametrize("bias", [True, False])
def test_folded_bias_is_what_the_offset_adds(weight_scale: str, offset_shape: tuple[int, ...], bias: bool) -> None:
    layer = _linear(offset_shape, weight_scale, bias)
    codes, scale = layer.weight.codes(), layer.weight.scale
    assert layer.input.offset is not None
    expected = []
    for m in range(5):
        total = float(layer.bias[m]) if layer.bias is not None else 0.0
        for k in range(128):
            step = scale[m, k // 64] if weight_scale == "group" else scale[m, 0] if weight_scale == "channel" else scale[0]
            total += float(codes[m, k]) * float(step) * float(layer.input.offset[k % len(layer.input.offset)])
        expected.append(total)
    folded = layer.folded_bias()
    assert folded is not None
    assert folded.dtype == np.float32
    # Rounded once, from float64: not even the last bit of float32 may differ.
    np.testing.assert_array_max_ulp(folded, np.asarray(expected, np.float32), maxulp=1)


def test_folded_bias_without_offset_is_the_bias() -> None:
    layer = _linear(None, "channel", bias=True)
    assert layer.folded_bias() is layer.bias
    assert _linear(None, "channel", bias=False).folded_bias() is None


def test_weight_codes_are_unpacked_row_by_row() -> None:
    spec = QuantSpec(4, signed=True, scale=PerChannel(), operand=Operand.WEIGHT)
    weight = Weight(spec, (2, 3), pack(np.asarray([[-8, 0, 7], [1, 2, 3]]), 4), np.ones((2, 1), np.float32))
    assert weight.codes().tolist() == [[-8, 0, 7], [1, 2, 3]]
    assert weight.codes().dtype == np.int8


def test_values_of_weights_at_odd_half_steps() -> None:
    spec = QuantSpec(2, signed=True, scale=PerChannel(), offset=HalfStep(), operand=Operand.WEIGHT)
    codes = np.asarray([[-2, -1, 0, 1], [1, 0, -1, -2]])
    weight = Weight(spec, (2, 4), pack(codes, 2), np.asarray([[0.5], [2.0]], np.float32))
    assert weight.half_step
    assert weight.values().tolist() == [[-0.75, -0.25, 0.25, 0.75], [3.0, 1.0, -1.0, -3.0]]
    source = Quantizer(QuantSpec(4, offset=PerTensor()), np.asarray([0.25], np.float32), np.asarray([0.5], np.float32))
    folded = Linear("layer", source, weight, np.asarray([1.0, 2.0], np.float32)).folded_bias()
    assert folded is not None
    assert folded.tolist() == [1.0, 2.0]
    lopsided = Weight(spec, (2, 4), pack(np.ones_like(codes), 2), weight.scale)
    folded = Linear("layer", source, lopsided, None).folded_bias()
    assert folded is not None
    assert folded.tolist() == [0.5 * 4 * 0.75, 0.5 * 4 * 3.0]


def test_half_step_is_told_from_a_learned_offset() -> None:
    scale = np.ones((3, 1, 1), np.float32)
    half = QuantSpec(4, signed=True, scale=PerHead(), offset=HalfStep(), operand=Operand.QUERY)
    learned = QuantSpec(4, signed=True, scale=PerHead(), offset=PerHead(), operand=Operand.QUERY)
    assert Quantizer(half, scale, scale / 2).half_step
    assert not Quantizer(learned, scale, scale / 2).half_step
